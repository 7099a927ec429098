"""The judge: its loss, its preprocessing and its ranks, with real classes and random weights."""

from __future__ import annotations

import re
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.images import load_image
from flatlora_diffusion.evaluation.judge import (
    STYLE_PROMPTS,
    Judge,
    embed_images,
    embed_texts,
    image_vectors,
    load_judge,
    pixel_values,
    rank_names,
    rank_of,
    style_probabilities,
)
from flatlora_diffusion.storage.rng import generator
from samples.tiny_sdxl.recipe.judge import (
    STYLES,
    build_judge,
    build_processor,
    reading_patches,
)

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    letters = [letter + end for letter in string.ascii_lowercase + string.digits for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=77)


@pytest.fixture(scope="module")
def judge(tokenizer: CLIPTokenizer) -> Judge:
    text = {**SMALL, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL, "image_size": 64, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return Judge(model.eval(), build_processor(tokenizer).tokenizer)


def pictures(count: int, size: int = 64) -> list[Image.Image]:
    """Smooth random images, so that two ways to resize them must agree."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((size, size), Image.Resampling.BICUBIC) for image in coarse]


def as_tensor(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 for image in images])


def test_probabilities_have_a_row_per_image_and_sum_to_one(judge: Judge) -> None:
    names = rank_names(judge, pictures(3), ["cat", "dog face", "red apple", "fox", "ant"])
    styles = style_probabilities(judge, pictures(3))
    assert names.shape == (3, 5)
    assert styles.shape == (3, 4)
    assert tuple(STYLE_PROMPTS) == STYLES
    for rows in (names, styles):
        torch.testing.assert_close(rows.sum(dim=1), torch.ones(3))


def test_the_name_whose_vector_is_the_image_ranks_first(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    images, names = pictures(6), ["zero", "one", "two", "three", "four", "five"]
    right = torch.tensor([3, 0, 5, 1, 4, 2])
    vectors = embed_images(judge, images)

    def rigged(_judge: Judge, texts: list[str]) -> Tensor:
        assert texts == [f"an icon of {name}" for name in names]
        return vectors[right.argsort()]

    monkeypatch.setattr("flatlora_diffusion.evaluation.judge.embed_texts", rigged)
    probabilities = rank_names(judge, images, names)
    assert rank_of(probabilities, right).tolist() == [0] * 6
    assert rank_of(probabilities, right.roll(1)).min() > 0


def test_a_tie_counts_against_the_right_name() -> None:
    scores = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2], [1.0, 1.0, 1.0]])
    assert rank_of(scores, torch.tensor([1, 0, 2])).tolist() == [0, 1, 2]
    assert rank_of(scores, torch.tensor([0, 2, 0])).tolist() == [2, 2, 2]


def test_a_text_does_not_depend_on_the_texts_beside_it(judge: Judge) -> None:
    alone = embed_texts(judge, ["fox"])
    beside = embed_texts(judge, ["fox", "a very long name of a thing", "x" * 500])
    torch.testing.assert_close(beside[:1], alone)
    torch.testing.assert_close(beside.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("size", [64, 256])
def test_images_are_read_as_the_saved_processor_reads_them(tokenizer: CLIPTokenizer, size: int) -> None:
    images = pictures(2, size)
    expected = build_processor(tokenizer).image_processor(images, return_tensors="pt")["pixel_values"]
    tolerance = 1e-6 if size == 64 else 0.02  # the processor rounds a resized image to 8 bits, in [-1, 1]
    torch.testing.assert_close(pixel_values(images, 64), expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(pixel_values(as_tensor(images), 64), expected, atol=tolerance, rtol=0)


def test_images_whose_crop_or_background_is_open_are_refused() -> None:
    with pytest.raises(ValueError, match="RGBA is not RGB: composite"):
        pixel_values([Image.new("RGBA", (64, 64))], 64)
    with pytest.raises(ValueError, match="80 x 64 is not square: crop or pad"):
        pixel_values([Image.new("RGB", (80, 64))], 64)


def test_the_saved_folder_works_alone_and_gives_the_same_numbers(judge: Judge, tmp_path: Path) -> None:
    build_processor(judge.tokenizer).save_pretrained(tmp_path)
    judge.model.save_pretrained(tmp_path)
    names, images = ["cat", "dog face"], pictures(2)
    loaded = load_judge(tmp_path)
    torch.testing.assert_close(rank_names(loaded, images, names), rank_names(judge, images, names))
    processor = CLIPProcessor.from_pretrained(tmp_path)
    assert processor.tokenizer.model_max_length == loaded.model.config.text_config.max_position_embeddings == 32
    texts = [f"an icon of {name}" for name in names]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = CLIPModel.from_pretrained(tmp_path)(**batch).logits_per_image
    torch.testing.assert_close(logits.softmax(dim=1), rank_names(judge, images, names))


def test_the_shipped_size_fits_8_megabytes_in_fp16(tokenizer: CLIPTokenizer) -> None:
    with torch.random.fork_rng():
        count = sum(parameter.numel() for parameter in build_judge(tokenizer).parameters())
    whole_vocabulary = count + (4096 - len(tokenizer)) * 128
    assert 3.4e6 < whole_vocabulary < 3.9e6


def test_only_the_kept_patches_are_read(judge: Judge) -> None:
    pixels = as_tensor(pictures(2)) * 2 - 1
    everywhere = torch.rand(2, 64, generator=generator("cpu", 0, "patches")).argsort(dim=1)
    with torch.no_grad():
        plain = image_vectors(judge.model, pixels)
        with reading_patches(judge.model, everywhere):
            torch.testing.assert_close(image_vectors(judge.model, pixels), plain)
        changed = pixels.clone()
        changed[:, :, :8, 8:16] = 1.0  # patch 1
        others = torch.tensor([[0, 9, 30, 63]] * 2)
        with reading_patches(judge.model, others):
            kept = image_vectors(judge.model, pixels)
            torch.testing.assert_close(image_vectors(judge.model, changed), kept)
        with reading_patches(judge.model, others.index_fill(1, torch.tensor([1]), 1)):
            assert not torch.allclose(image_vectors(judge.model, changed), image_vectors(judge.model, pixels))


def test_all_patches_are_read_again_after_an_exception(judge: Judge) -> None:
    pixels = as_tensor(pictures(1)) * 2 - 1
    with torch.no_grad():
        plain = image_vectors(judge.model, pixels)
        with pytest.raises(KeyError), reading_patches(judge.model, torch.tensor([[0, 1]])):
            raise KeyError
        assert torch.equal(image_vectors(judge.model, pixels), plain)


def test_the_shipped_judge_names_the_sample_icons_and_knows_their_style() -> None:
    """Trained on most of these renders: a broken file or preprocessing shows, not how good the judge is."""
    judge = load_judge(SAMPLES / "tiny_sdxl" / "judge")
    samples = load_samples(SAMPLES / "icons_3d").samples
    images = [load_image(sample.source) for sample in samples]
    names = [re.sub("a TOK icon of (an? )?|, in the style of TOK", "", sample.caption) for sample in samples]
    result = rank_of(rank_names(judge, images, names), torch.arange(len(names)))
    assert float((result == 0).float().mean()) >= 0.8
    styles = style_probabilities(judge, images).argmax(dim=1)
    assert float((styles == list(STYLE_PROMPTS).index("fluent-3d")).float().mean()) >= 0.8
    assert sum(file.stat().st_size for file in (SAMPLES / "tiny_sdxl" / "judge").iterdir()) < 8e6
