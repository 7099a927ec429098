"""Captions: cached embeddings, truncation, tag dropout and shuffling; masks beside the images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import samples_of

from flatlora_diffusion.config import ConfigError, DataConfig, RunError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples, manifest
from flatlora_diffusion.data.images import ImageError
from flatlora_diffusion.data.prompts import augmented_caption
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.training.state import prepare


def test_prompt_embeddings_are_cached_on_disk_and_recomputed_for_a_changed_caption(
    config: TrainConfig, icons: Path, tmp_path: Path
) -> None:
    cached = config.replace(cache_text_embeddings=True, embedding_cache_dir=str(tmp_path / "cache"))
    plain = prepare(config, samples_of(config)).batches.batch(0, 0)
    for _ in range(2):
        batch = prepare(cached, samples_of(config)).batches.batch(0, 0)
        assert torch.equal(batch.prompts["prompt_embeds"], plain.prompts["prompt_embeds"])
        assert len(list((tmp_path / "cache").iterdir())) == 3
    prepare(cached.replace(clip_skip=1), samples_of(config))
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_truncated_captions_are_a_warning(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    samples = samples_of(config)
    with caplog.at_level("WARNING"):
        prepare(config, [replace(samples[0], caption="cat " * 75), *samples[1:]])
    assert "tokens" not in caplog.text
    long = [samples[0], *(replace(sample, caption="cat " * 76) for sample in samples[1:])]
    with caplog.at_level("WARNING"):
        prepare(config, long)
    assert "2 images have captions of more than 77 tokens (icon-1.png the first)" in caplog.text


def test_embeddings_that_overflow_name_the_caption_and_the_precision(config: TrainConfig, sdxl: Sdxl) -> None:
    encoder = sdxl.pipeline.text_encoder_2.half()
    encoder.text_model.final_layer_norm.weight.data.fill_(6e4)
    with pytest.raises(RunError, match=r"'an icon of thing 0'.*--mixed_precision"):
        prepare(config, samples_of(config), load=lambda *_: sdxl)


CAPTION = "TOK, 1girl, red hat, smile, tree, sky"


def drawn(data: DataConfig, epochs: int = 200) -> list[list[str]]:
    return [augmented_caption(CAPTION, data, 0, "a.png", epoch).split(", ") for epoch in range(epochs)]


def test_the_first_tags_stay_in_place_and_the_others_are_shuffled() -> None:
    captions = drawn(DataConfig(shuffle_tags=True, keep_tags=2))
    assert all(tags[:2] == ["TOK", "1girl"] and sorted(tags) == sorted(CAPTION.split(", ")) for tags in captions)
    assert len({tuple(tags) for tags in captions}) == 24, "all orders of four tags"
    assert captions == drawn(DataConfig(shuffle_tags=True, keep_tags=2)), "a function of seed, image and epoch"
    assert augmented_caption(CAPTION, DataConfig(), 0, "a.png", 3) == CAPTION


def test_tag_dropout_drops_that_fraction_of_the_other_tags() -> None:
    captions = drawn(DataConfig(tag_dropout=0.25, keep_tags=1), 2000)
    assert all(tags[0] == "TOK" for tags in captions)
    assert sum(len(tags) - 1 for tags in captions) / (2000 * 5) == pytest.approx(0.75, abs=0.02)
    orders = [[CAPTION.split(", ").index(tag) for tag in tags] for tags in captions]
    assert all(order == sorted(order) for order in orders), "without --shuffle_tags in their order"


def test_batches_have_the_embeddings_of_the_shuffled_captions(config: TrainConfig) -> None:
    state = prepare(config.replace(tag_dropout=1.0, keep_tags=0, offload=True, cache_latents=True), samples_of(config))
    batch = state.batches.batch(0, 0)
    empty, _, pooled, _ = state.base.pipeline.encode_prompt("", do_classifier_free_guidance=False)
    torch.testing.assert_close(batch.prompts["prompt_embeds"][:1], empty)
    torch.testing.assert_close(batch.prompts["pooled_prompt_embeds"][:1], pooled)


def test_caption_settings_that_exclude_each_other_are_an_error(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"--keep_tags.*--shuffle_tags"):
        config.replace(keep_tags=1)
    with pytest.raises(ConfigError, match=r"--cache_text_embeddings.*--shuffle_tags"):
        config.replace(shuffle_tags=True, cache_text_embeddings=True)


def test_a_mask_file_beside_an_image_selects_the_pixels_of_the_loss(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "masked"
    folder.mkdir()
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    mask.save(folder / "a-masklabel.png")
    Image.new("RGB", (32, 32), "blue").save(folder / "lone-masklabel.png")
    result = load_samples(folder, "an icon")
    assert [one.id for one in result.samples] == ["a.png", "lone-masklabel.png"], "a name alone makes no mask"
    assert "1 with a mask" in result.summary
    assert "mask_sha256" in manifest(result.samples)[0]
    asked = config.replace(instance_data_dir=str(folder), alpha_mask_loss=True, train_batch_size=1, center_crop=True)
    state = prepare(asked, result.samples[:1])
    shown = state.batches.batch(0, 0).mask
    assert shown is not None
    assert shown[0, 0, :, :4].eq(1).all()
    assert shown[0, 0, :, 4:].eq(0).all()
    Image.new("L", (30, 32), 0).save(folder / "a-masklabel.png")
    with pytest.raises(ImageError, match=r"a-masklabel\.png .* 30 x 32 pixels"):
        state.batches.augmentation.alpha(result.samples[0], state.batches._instances(0, 0)[0].view)
