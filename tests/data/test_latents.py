"""Cached latents: their view, their files, and the VAE off the GPU when it is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import samples_of

from flatlora_diffusion.config import TEXT_PARTS, RunError, TrainConfig
from flatlora_diffusion.families.sdxl.pipeline import Sdxl
from flatlora_diffusion.families.sdxl.vae import posterior
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train_step


def test_cached_latents_equal_those_of_the_same_crop_and_flip(config: TrainConfig, tmp_path: Path) -> None:
    cached = config.replace(cache_latents=True, random_flip=True, embedding_cache_dir=str(tmp_path / "cache"))
    first = prepare(cached, samples_of(config)).batches
    files = set((tmp_path / "cache").iterdir())
    assert len(files) == 2 * 3
    again = prepare(cached, samples_of(config)).batches
    assert set((tmp_path / "cache").iterdir()) == files
    flips = set()
    for step in range(6):
        rows = first._instances(step, 0)
        flips |= {row.view.is_mirrored for row in rows}
        pixels = torch.stack([first.augmentation.pixels(row.sample, row.view) for row in rows])
        mean, std = posterior(first.base.vae, pixels)
        result = first._posteriors(rows, [], step, 0)
        assert torch.equal(result[0], mean), "an image has the same latents alone and in a batch"
        assert torch.equal(result[1], std)
        assert torch.equal(again.batch(step, 0).latents, first.batch(step, 0).latents)
    assert flips == {True, False}
    prepare(cached.replace(background_color="red"), samples_of(config))
    assert len(set((tmp_path / "cache").iterdir())) == 2 * len(files), "the background changes the pixels"


@pytest.mark.parametrize("buckets", [False, True])
def test_offload_keeps_the_vae_on_the_device_if_class_images_are_still_to_be_encoded(
    config: TrainConfig, icons: Path, monkeypatch: pytest.MonkeyPatch, buckets: bool
) -> None:
    moves: Any = []
    plain = Sdxl.move
    monkeypatch.setattr(Sdxl, "move", lambda sdxl, parts, to: (moves.append(parts), plain(sdxl, parts, to))[1])
    prior = {"with_prior_preservation": True, "class_data_dir": str(icons), "class_prompt": "an icon"}
    settings = {"cache_latents": True, "offload": True, "use_aspect_ratio_buckets": buckets, **prior}
    prepare(config.replace(**settings), samples_of(config), samples_of(config))
    _to_the_device, away, _unet = moves
    assert set(TEXT_PARTS) <= set(away)
    assert ("vae" in away) is not buckets


@pytest.mark.parametrize("is_cached", [True, False])
def test_latents_with_nan_stop_the_run_with_the_image_s_name(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    settings = config.replace(cache_latents=is_cached, embedding_cache_dir=str(tmp_path / "cache"))
    samples = samples_of(config)

    def spoiled(base: Sdxl, pixels: Any) -> Any:
        mean, std = posterior(base.vae, pixels)
        mean[-1, 0, 0, 0] = torch.nan
        return mean, std

    monkeypatch.setattr(Sdxl, "posterior", spoiled)
    expected = r"{}.*--pretrained_vae_model_name_or_path"
    if is_cached:
        with pytest.raises(RunError, match=expected.format(samples[0].id)):
            prepare(settings, samples)
        assert not list((tmp_path / "cache").glob("latent-*"))
        return
    state = prepare(settings, samples)
    last = state.batches.samples_at(0, 0)[-1].id
    with pytest.raises(RunError, match=expected.format(last)):
        train_step(state, 0)
