"""Batches by (step, slot): samples, crops, prompt embeddings and caption dropout."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import samples_of

from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.data.batches import Batches, build_batches
from flatlora_diffusion.data.crops import Augmentation, View
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


@pytest.fixture(scope="module")
def sdxl(base: Path) -> Sdxl:
    return load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), torch.float32)


def make_batches(sdxl: Sdxl, icons: Path, world_size: int = 1, **settings: object) -> Batches:
    values = {"seed": 0, "resolution": 32, "train_batch_size": 2, **settings}
    return build_batches(TrainConfig.from_dict(values), sdxl, load_samples(icons).samples, world_size)


def make_batches_of_one_picture(sdxl: Sdxl, icons: Path, names: Sequence[str], **settings: object) -> Batches:
    """A batches of one picture, once under each of `names`."""
    values = {"seed": 0, "resolution": 32, "train_batch_size": len(names), **settings}
    picture = load_samples(icons).samples[0]
    return build_batches(TrainConfig.from_dict(values), sdxl, [replace(picture, id=name) for name in names])


@pytest.mark.parametrize("buckets", [False, True])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("class_images", [0, 2])
def test_batches_need_the_vae_exactly_if_they_encode_images(
    sdxl: Sdxl, icons: Path, monkeypatch: pytest.MonkeyPatch, buckets: bool, cached: bool, class_images: int
) -> None:
    settings = {"cache_latents": cached, "use_aspect_ratio_buckets": buckets, "resolution": 32, "seed": 0}
    samples = load_samples(icons).samples
    batches = build_batches(TrainConfig.from_dict(settings), sdxl, samples, class_samples=samples[:class_images])
    encoded: Any = []
    real = Sdxl.posterior
    monkeypatch.setattr(Sdxl, "posterior", lambda base, pixels: (encoded.append(pixels), real(base, pixels))[1])
    batches.batch(0, 0)
    assert batches.needs_vae is bool(encoded)


def test_each_epoch_has_each_image_once(sdxl: Sdxl, icons: Path) -> None:
    batches = make_batches(sdxl, icons)
    shown = [sample.id for step in range(6) for sample in batches.samples_at(step, 0)]
    for epoch in range(4):
        assert sorted(shown[3 * epoch : 3 * epoch + 3]) == ["icon-0.png", "icon-1.png", "icon-2.png"]
    assert len({tuple(shown[3 * epoch : 3 * epoch + 3]) for epoch in range(4)}) > 1


def tensors_of(batch: Batch) -> dict[str, torch.Tensor]:
    return {"latents": batch.latents, **batch.prompts, **batch.geometry}


def test_two_processes_get_the_batches_of_one_with_accumulation_2(sdxl: Sdxl, icons: Path) -> None:
    one = make_batches(sdxl, icons, gradient_accumulation_steps=2, caption_dropout=0.5, random_flip=True)
    two = make_batches(sdxl, icons, world_size=2, caption_dropout=0.5, random_flip=True)
    for step in range(3):
        for slot in range(2):
            a, b = one.batch(step, slot), two.batch(step, slot)
            for name, value in tensors_of(a).items():
                assert torch.equal(value, tensors_of(b)[name]), name


def test_a_batch_is_a_function_of_its_key_and_other_keys_give_other_batches(sdxl: Sdxl, icons: Path) -> None:
    batches = make_batches(sdxl, icons)
    assert torch.equal(batches.batch(4, 0).latents, batches.batch(4, 0).latents)
    single = make_batches(sdxl, icons, train_batch_size=3, center_crop=True)  # every step shows all three images
    order = [{s.id: i for i, s in enumerate(single.samples_at(step, 0))} for step in (0, 1)]
    a, b = (single.batch(step, 0).latents[order[step]["icon-0.png"]] for step in (0, 1))
    assert not torch.equal(a, b), "the VAE's posterior was not sampled anew"


def test_prompts_are_encoded_as_the_pipeline_encodes_them(sdxl: Sdxl, icons: Path) -> None:
    batches = make_batches(sdxl, icons)
    batch = batches.batch(0, 0)
    for row, sample in enumerate(batches.samples_at(0, 0)):
        embeds, _, pooled, _ = sdxl.pipeline.encode_prompt(sample.caption, do_classifier_free_guidance=False)
        assert torch.equal(batch.prompts["prompt_embeds"][row], embeds[0])
        assert torch.equal(batch.prompts["pooled_prompt_embeds"][row], pooled[0])


def test_images_are_resized_with_the_filter_of_the_settings(sdxl: Sdxl, icons: Path) -> None:
    one, other = (
        make_batches(sdxl, icons, image_interpolation_mode=mode).batch(0, 0) for mode in ("nearest", "lanczos")
    )
    assert torch.equal(one.geometry["add_time_ids"], other.geometry["add_time_ids"]), "these are the same crops"
    assert not torch.equal(one.latents, other.latents)


def test_time_ids_have_original_size_crop_and_target_size(sdxl: Sdxl, icons: Path) -> None:
    batches, corners = make_batches(sdxl, icons), []
    for step in range(4):
        for ids, row in zip(batches.batch(step, 0).geometry["add_time_ids"], batches._instances(step, 0), strict=True):
            assert ids[:2].tolist() == [row.sample.height, row.sample.width]
            assert ids[2:4].tolist() == list(row.view.crop_top_left)
            assert ids[4:].tolist() == [32, 32]
            corners.append(row.view.crop_top_left)
    assert any(top != left for top, left in corners), "swapped ones would be seen"


def test_dropped_captions_are_zero_embeddings_at_about_the_given_rate(sdxl: Sdxl, icons: Path) -> None:
    batches = make_batches(sdxl, icons, caption_dropout=0.25)
    dropped = []
    for step in range(100):
        batch = batches.batch(step, 0)
        empty = batch.prompts["prompt_embeds"].abs().sum(dim=(1, 2)) == 0
        assert torch.equal(empty, batch.prompts["pooled_prompt_embeds"].abs().sum(dim=1) == 0)
        dropped += empty.tolist()
    assert 30 <= sum(dropped) <= 70  # 200 draws at 0.25: 50 +- 6


@pytest.mark.parametrize("settings", [{}, {"shuffle_tags": True}], ids=["encoded once", "encoded in each step"])
@pytest.mark.parametrize("zeros", [True, False], ids=["zeros", "empty prompt"])
def test_a_dropped_caption_has_the_embedding_of_the_pipeline_s_empty_prompt(
    base: Path, icons: Path, zeros: bool, settings: dict[str, Any]
) -> None:
    sdxl = load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), torch.float32)
    sdxl.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    _, expected, _, pooled = sdxl.pipeline.encode_prompt("an icon", do_classifier_free_guidance=True)
    assert bool(expected.any()) is not zeros
    batch = make_batches(sdxl, icons, caption_dropout=1.0, **settings).batch(0, 0)
    torch.testing.assert_close(batch.prompts["prompt_embeds"], expected.expand(2, -1, -1))
    torch.testing.assert_close(batch.prompts["pooled_prompt_embeds"], pooled.expand(2, -1))


def test_posterior_noise_and_caption_dropout_differ_between_steps_and_slots(sdxl: Sdxl, icons: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "center_crop": True, "caption_dropout": 0.5}
    batches = make_batches_of_one_picture(sdxl, icons, ["a"], **settings)
    steps = [[batches.batch(step, slot) for slot in (0, 1)] for step in range(20)]
    latents = [batch.latents for step in steps for batch in step]
    assert not any(torch.equal(a, b) for i, a in enumerate(latents) for b in latents[:i])
    dropped = [[not batch.prompts["prompt_embeds"].any() for batch in step] for step in steps]
    assert {one == two for one, two in dropped} == {False, True}


def test_crop_and_flip_differ_between_epochs_and_images(sdxl: Sdxl, icons: Path) -> None:
    batches = make_batches_of_one_picture(sdxl, icons, ["a", "b"], random_flip=True)
    seen: dict[str, list[View]] = {"a": [], "b": []}
    for epoch in range(12):  # each batch is one
        for row in batches._instances(epoch, 0):
            seen[row.sample.id].append(row.view)
    for views in seen.values():
        assert {view.is_mirrored for view in views} == {False, True}
        assert len({view.crop_top_left for view in views}) > 1
    assert [view.is_mirrored for view in seen["a"]] != [view.is_mirrored for view in seen["b"]]
    assert [view.crop_top_left for view in seen["a"]] != [view.crop_top_left for view in seen["b"]]


def test_loader_threads_change_nothing(config: TrainConfig) -> None:
    plain = prepare(config.replace(gradient_accumulation_steps=2), samples_of(config)).batches
    threads = prepare(
        config.replace(gradient_accumulation_steps=2, dataloader_num_workers=2), samples_of(config)
    ).batches
    for step in range(4):
        for slot in range(2):
            assert torch.equal(plain.batch(step, slot).latents, threads.batch(step, slot).latents)


def test_loader_threads_decode_each_image_of_a_batch_once(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.replace(gradient_accumulation_steps=4, dataloader_num_workers=2, train_batch_size=1)
    batches, here = prepare(config, samples_of(config)).batches, threading.current_thread()
    whole, decoded = Augmentation.pixels, []

    def counted(self: Augmentation, *given: Any) -> torch.Tensor:
        decoded.append(threading.current_thread() is here)
        return whole(self, *given)

    monkeypatch.setattr(Augmentation, "pixels", counted)
    for step in range(3):
        for slot in range(4):
            for _ in range(2 if (step, slot) == (0, 0) else 1):  # as the self-check does
                batches.batch(step, slot)
    assert batches._loader is not None
    batches._loader.shutdown()
    assert decoded.count(True) == 4 + 1, "in the foreground those of the first step alone"
    assert decoded.count(False) == 3 * 4, "in the background those of each step after it"


def test_transparent_pixels_do_not_count_in_the_masked_loss(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "transparent"
    folder.mkdir()
    icon = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    icon.paste((200, 0, 0, 255), (0, 0, 16, 32))
    icon.save(folder / "half.png")
    masked = config.replace(instance_data_dir=str(folder), instance_prompt="x", alpha_mask_loss=True)
    batch = prepare(masked, load_samples(folder, "x").samples).batches.batch(0, 0)
    assert batch.mask is not None
    assert batch.mask.shape == (2, 1, 8, 8)
    assert batch.mask[0, 0, :, :4].eq(1).all()
    assert batch.mask[0, 0, :, 4:].eq(0).all()
    train(masked.replace(max_train_steps=1))
