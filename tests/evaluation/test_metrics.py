"""Metrics against numpy, encoders against transformers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from flatlora_diffusion.config import SAMPLES, ConfigError
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.images import load_image
from flatlora_diffusion.evaluation import perceptual
from flatlora_diffusion.evaluation.captioner import load_captioner
from flatlora_diffusion.evaluation.encoders import Encoder, load_encoder
from flatlora_diffusion.evaluation.judge import load_judge
from flatlora_diffusion.evaluation.metrics import (
    METRICS,
    describe_metrics,
    diversities,
    drifts,
    encode_reference,
    image_similarity,
    judge_metrics,
    memorization_threshold,
    nearest_cosines,
    own_nearest_cosines,
    picture_metrics,
)

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLIP_PIXELS = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
DINO_PIXELS = {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}


def unit(*shape: int, seed: int = 0) -> Tensor:
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=-1)


def pictures(count: int, width: int = 40, height: int = 40) -> list[Image.Image]:
    """Smooth random images."""
    rng = np.random.default_rng(0)
    coarse = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((width, height), Image.Resampling.BICUBIC) for image in coarse]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    text = {**SMALL, "vocab_size": 4096, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(SAMPLES / "tiny_sdxl" / "tokenizer").save_pretrained(folder)
    CLIPImageProcessorPil(**CLIP_PIXELS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dino")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Dinov2Model(Dinov2Config(**SMALL, image_size=16, patch_size=8, mlp_ratio=2)).save_pretrained(folder)
    BitImageProcessorPil(**DINO_PIXELS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge_encoder() -> Encoder:
    return load_encoder("judge")


@pytest.fixture(scope="module")
def training() -> list[Image.Image]:
    return [load_image(sample.source) for sample in load_samples(SAMPLES / "icons_3d").samples]


@pytest.fixture(scope="module")
def heldout() -> dict[tuple[str, int], Image.Image]:
    """The held-out icons as if they had been generated: by caption and seed 0."""
    samples = load_samples(SAMPLES / "icons_3d" / "heldout").samples
    return {(sample.caption, 0): load_image(sample.source) for sample in samples}


@pytest.fixture(scope="module")
def names() -> dict[str, str]:
    lines = (SAMPLES / "icons_3d" / "heldout" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["text"]: row["name"] for row in map(json.loads, lines)}


def flat_icons() -> list[Image.Image]:
    """The hundred icons that the tiny base drew before it ever saw a 3D icon, cut from its contact sheet."""
    sheet = load_image(SAMPLES / "tiny_sdxl" / "contact_sheet.png")
    corners = [(8 + 136 * column, 8 + 166 * row) for row in range(10) for column in range(10)]
    return [sheet.crop((left, top, left + 128, top + 128)) for left, top in corners]


def test_the_formulas_are_those_of_numpy() -> None:
    first, second = unit(4, 6), unit(4, 6, seed=1)
    cosines = np.array([[float(np.dot(a, b)) for b in second.numpy()] for a in first.numpy()])
    np.testing.assert_allclose(drifts(first, second), (1 - cosines.diagonal()) / 2, atol=1e-6)
    np.testing.assert_allclose(nearest_cosines(first, second), cosines.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(image_similarity(first, second), cosines.mean(axis=1), atol=1e-6)
    result = diversities(first, ["a", "b", "a", "a"])
    rows = first.numpy()
    pairs = [1 - float(np.dot(rows[i], rows[j])) for i, j in ((0, 2), (0, 3), (2, 3))]
    assert result == {"a": pytest.approx(sum(pairs) / 3, abs=1e-6)}


def test_a_training_image_is_not_its_own_neighbour() -> None:
    rows = unit(5, 6)
    expected = [max(float(rows[i] @ rows[j]) for j in range(5) if j != i) for i in range(5)]
    torch.testing.assert_close(own_nearest_cosines(rows), torch.tensor(expected))
    assert memorization_threshold(rows, 0.5) == pytest.approx(sorted(expected)[2], abs=1e-6)


def test_copies_of_training_icons_are_memorized_and_other_icons_are_not(
    judge_encoder: Encoder, training: list[Image.Image], heldout: dict[tuple[str, int], Image.Image]
) -> None:
    blurred = [image.resize((64, 64)).filter(ImageFilter.GaussianBlur(1)) for image in training]
    copies = {(f"copy {index}", 0): image for index, image in enumerate(blurred)}
    reference = encode_reference(judge_encoder, training, {**copies, **heldout})
    copied, others = picture_metrics(reference, copies), picture_metrics(reference, heldout)
    assert copied["memorized_share"] == 1
    assert copied["memorization"] > 0.97
    assert others["memorized_share"] < 0.3
    assert others["memorization"] < 0.8


def test_a_model_that_changes_nothing_has_no_drift(
    judge_encoder: Encoder, training: list[Image.Image], heldout: dict[tuple[str, int], Image.Image]
) -> None:
    base = dict(list(heldout.items())[:6])
    images = list(base.values())
    mixed = dict(zip(base, images[1:] + images[:1], strict=True))
    real = {prompt: image for (prompt, _), image in base.items()}
    reference = encode_reference(judge_encoder, training, base, heldout=real)
    in_other_order = dict(reversed(base.items()))
    same, other = (
        picture_metrics(reference, in_other_order, unrelated=base),
        picture_metrics(reference, mixed, unrelated=mixed),
    )
    assert same["drift"] == 0
    assert same["style_change"] == pytest.approx(0, abs=1e-9), "an image's place in its batch may change the rounding"
    assert same["heldout_similarity"] == pytest.approx(1, abs=1e-5)
    assert 0.05 < other["drift"] <= 1
    assert other["heldout_similarity"] == pytest.approx(1 - 2 * other["drift"], abs=1e-5)


def test_right_names_are_more_faithful_than_wrong_ones(
    judge_encoder: Encoder,
    training: list[Image.Image],
    heldout: dict[tuple[str, int], Image.Image],
    names: dict[str, str],
) -> None:
    prompts = list(names)
    right = {prompt: f"an icon of {names[prompt]}" for prompt in prompts}
    wrong = {prompt: right[prompts[index - 1]] for index, prompt in enumerate(prompts)}
    scores = [
        picture_metrics(encode_reference(judge_encoder, training, heldout, texts=texts), heldout)["prompt_fidelity"]
        for texts in (right, wrong)
    ]
    assert scores[0] > scores[1] + 0.2


def test_the_judge_tells_3d_icons_from_the_flat_ones_of_the_base(
    heldout: dict[tuple[str, int], Image.Image], names: dict[str, str]
) -> None:
    judge = load_judge(SAMPLES / "tiny_sdxl" / "judge")
    candidates = list(names.values())
    solid = judge_metrics(judge, heldout, names, candidates)
    flat = {("a flat icon", seed): image for seed, image in enumerate(flat_icons())}
    drawn = judge_metrics(judge, flat, {"a flat icon": candidates[0]}, candidates)
    assert solid["style_probability"] > 0.7 > 0.3 > drawn["style_probability"]
    assert solid["name_found"] > 0.9
    assert drawn["name_found"] < 0.1  # each is asked for the name of one thing


def test_keys_are_there_where_something_defines_them(clip_folder: Path, dino_folder: Path) -> None:
    images = pictures(5)
    style = dict(zip([("a", 0), ("a", 1), ("b", 0)], images[:3], strict=True))
    for folder, has_text in ((clip_folder, True), (dino_folder, False)):
        encoder = load_encoder(str(folder))
        values = picture_metrics(encode_reference(encoder, images[3:], style, {"b": images[4]}), style, style)
        text = {"prompt_fidelity"} if has_text else set()
        assert set(values) == {metric.key for metric in METRICS[:8]} - {"prompt_fidelity"} | text
        one = {("b", 0): images[2]}
        few = picture_metrics(encode_reference(encoder, images[3:4], one), one)
        assert set(few) == {"image_similarity", "style_change", "memorization"} | text
        assert list(few) == [row["key"] for row in describe_metrics(few)]
        with pytest.raises(ValueError, match=r"1 pictures .*'c', 7"):
            picture_metrics(encode_reference(encoder, images, one), {("c", 7): images[0]})


def test_metrics_of_several_encoders_are_described_apart() -> None:
    rows = describe_metrics(["drift", "dino_drift", "clip_prompt_fidelity"])
    assert [(row["key"], row["name"], row["better"]) for row in rows] == [
        ("drift", "drift", "lower"),
        ("dino_drift", "drift (dino)", "lower"),
        ("clip_prompt_fidelity", "prompt fidelity (clip)", "higher"),
    ]
    assert set(rows[0]) == {"key", "name", "better", "help", "digits"}
    with pytest.raises(KeyError, match="beauty"):
        describe_metrics(["beauty"])


@torch.no_grad()
def test_a_clip_gives_the_vectors_of_transformers(clip_folder: Path) -> None:
    encoder = load_encoder(str(clip_folder))
    model = CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    images, texts = pictures(35, 50, 40), ["a TOK icon of a fox", "x" * 300]
    pixels = torch.as_tensor(np.stack(CLIPImageProcessorPil.from_pretrained(clip_folder)(images)["pixel_values"]))
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=20, return_tensors="pt")
    expected = model(pixel_values=pixels, **tokens)
    torch.testing.assert_close(encoder.embed_images(images), expected.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(encoder.embed_texts(texts), expected.text_embeds, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_dinov2_gives_its_class_token_and_reads_no_text(dino_folder: Path) -> None:
    encoder = load_encoder(str(dino_folder))
    model = Dinov2Model.from_pretrained(dino_folder).eval()
    images = pictures(3, 50, 40)
    pixels = torch.as_tensor(np.stack(BitImageProcessorPil.from_pretrained(dino_folder)(images)["pixel_values"]))
    token = model(pixels).pooler_output
    expected = token / token.norm(dim=1, keepdim=True)
    torch.testing.assert_close(encoder.embed_images(images), expected, atol=1e-5, rtol=0)
    with pytest.raises(ConfigError, match="images only"):
        encoder.embed_texts(["a fox"])


def test_what_is_no_encoder_is_named_in_one_sentence(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="encoder 'no/such-model' cannot be loaded: there is no such folder"):
        load_encoder("no/such-model")
    text_only = tmp_path / "text"
    CLIPTextModel(CLIPTextConfig(**SMALL, vocab_size=9, bos_token_id=0, eos_token_id=1)).save_pretrained(text_only)
    with pytest.raises(ConfigError, match="is a clip_text_model model; give 'judge', a CLIP or a DINOv2"):
        load_encoder(str(text_only))
    pickled = copied(clip_folder, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(CLIPModel.from_pretrained(clip_folder).state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be loaded: .*safetensors") as caught:
        load_encoder(str(pickled))
    assert "\n" not in str(caught.value)
    bare = copied(clip_folder, tmp_path / "bare")
    for file in bare.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(ConfigError, match=r"bare .*preprocessor_config.json"):
        load_encoder(str(bare))
    damaged = copied(clip_folder, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(ConfigError, match="damaged' cannot be loaded"):
        load_encoder(str(damaged))


def test_random_weights_are_not_taken_for_missing_ones(clip_folder: Path, dino_folder: Path, tmp_path: Path) -> None:
    mixed = copied(clip_folder, tmp_path / "mixed")
    (mixed / "model.safetensors").write_bytes((dino_folder / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"mixed' lacks .* of its weights, such as"):
        load_encoder(str(mixed))


def test_a_captioner_says_the_likeliest_words(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *(f"word{index}" for index in range(26))]
    special = {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    config = BlipConfig(
        text_config={**SMALL, **special, "vocab_size": len(words), "encoder_hidden_size": 16},
        vision_config={**SMALL, "image_size": 16, "patch_size": 8},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    vocabulary = {word: index for index, word in enumerate(words)}
    BertTokenizer(vocab=vocabulary, extra_special_tokens=["[DEC]"]).save_pretrained(tmp_path)
    BlipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    captioner = load_captioner(str(tmp_path), max_tokens=5)
    captions = captioner(pictures(3))
    assert captions == captioner(pictures(3)) == [greedy_words(tmp_path, image, words) for image in pictures(3)]
    assert all(captions)
    with pytest.raises(ConfigError, match="captioner 'no/such-model' cannot be loaded"):
        load_captioner("no/such-model")


def test_lpips_diversity_is_the_mean_over_pairs_of_seeds_of_a_prompt() -> None:
    def distance(first: Tensor, second: Tensor) -> Tensor:
        assert first.shape == second.shape == (1, 3, 4, 4)
        assert first.abs().max() <= 1
        return (first - second).abs().mean().view(1, 1, 1, 1)

    gray = {("a", seed): Image.new("RGB", (4, 4), (level,) * 3) for seed, level in enumerate((0, 51, 255))}
    alone = {("b", 0): Image.new("RGB", (4, 4), "white")}
    expected = (0.4 + 2 + 1.6) / 3
    assert perceptual.lpips_diversity(distance, {**gray, **alone}) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="two seeds"):
        perceptual.lpips_diversity(distance, alone)


def test_lpips_is_optional_and_downloads_nothing_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("lpips"):
        with pytest.raises(ConfigError, match="needs AlexNet's weights"):
            perceptual.load_lpips(tmp_path / "alexnet.pth")
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install lpips torchvision"):
        perceptual.load_lpips()


def test_lpips_uses_the_given_trunk(tmp_path: Path) -> None:
    lpips = pytest.importorskip("lpips")
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        alexnet = torchvision.models.alexnet(weights=None)
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    distance = perceptual.load_lpips(tmp_path / "alexnet.pth")
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float(distance(images[:1], images[:1])) == 0
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for part in (reference.net.slice1, reference.net.slice2, reference.net.slice3, reference.net.slice4):
        for number, layer in part.named_children():
            layer.load_state_dict(alexnet.features[int(number)].state_dict())
    for number, layer in reference.net.slice5.named_children():
        layer.load_state_dict(alexnet.features[int(number)].state_dict())
    torch.testing.assert_close(distance(images[:1], images[1:]), reference(images[:1], images[1:]))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="does not hold AlexNet's weights"):
        perceptual.load_lpips(tmp_path / "other.pth")


def greedy_words(folder: Path, image: Image.Image, words: list[str]) -> str:
    """At most five words, each the likeliest after those before it."""
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.as_tensor(np.stack(BlipImageProcessorPil.from_pretrained(folder)([image])["pixel_values"]))
    ids = [words.index("[DEC]")]
    with torch.no_grad():
        while len(ids) < 6 and ids[-1] != words.index("[SEP]"):
            logits = model(pixel_values=pixels, input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
    return " ".join(words[index] for index in ids if words[index].startswith("word"))


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target
