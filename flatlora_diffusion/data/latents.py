"""Cached VAE posteriors: mean and std of one seeded crop per image, plain and mirrored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from flatlora_diffusion.config import RunError
from flatlora_diffusion.data.crops import Augmentation, View, mirrored_view
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.storage.tensor_io import cached_tensors, fingerprint


class LatentCache:
    """Normalized mean and std, each (1, C, h, w), by sample id and mirroring."""

    def __init__(self, posteriors: Mapping[tuple[str, bool], tuple[Tensor, Tensor]]) -> None:
        self._posteriors = posteriors

    def posterior(self, keys: Sequence[tuple[str, bool]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the normalized mean and std, each (B, C, h, w), of the (id, is_mirrored) in `keys`."""
        means, stds = zip(*(self._posteriors[key] for key in keys), strict=True)
        return torch.cat(means).to(device), torch.cat(stds).to(device)


def encode_latents(
    base: Base,
    samples: Sequence[Sample],
    sizes: Sequence[tuple[int, int]],
    augmentation: Augmentation,
    folder: Path | None,
) -> LatentCache:
    """Encode both flips of the crop of sample i at `sizes[i]`, (height, width).

    Args:
        folder: where posteriors are cached for later runs, keyed by image, crop and VAE; None for no cache.
    """
    vae_hash = "" if folder is None else fingerprint(base.vae)
    posteriors = {}
    progress = tqdm(samples, desc="latents", disable=len(samples) < 100)
    for sample, size in zip(progress, sizes, strict=True):
        crop = augmentation.cached_view(sample, size)
        for view in (mirrored_view(crop, False), mirrored_view(crop, True)):
            key = json.dumps([sample.sha256, asdict(view), *augmentation.pixel_settings, vae_hash])
            name = f"latent-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
            path = None if folder is None else folder / name
            tensors = cached_tensors(path, partial(_encode, base, augmentation, sample, view))
            posteriors[sample.id, view.is_mirrored] = tensors["mean"], tensors["std"]
    return LatentCache(posteriors)


def nonfinite_names(latents: Tensor, samples: Sequence[Sample]) -> list[str]:
    """Return the names of the images whose latents (B, C, h, w) are not finite."""
    is_nonfinite = (~latents.isfinite()).flatten(1).any(dim=1).tolist()
    return [sample.id for sample, nonfinite in zip(samples, is_nonfinite, strict=True) if nonfinite]


def check_latents(latents: Tensor, samples: Sequence[Sample]) -> None:
    """Raise RunError that names the images whose latents are not finite."""
    names = nonfinite_names(latents, samples)
    if names:
        raise RunError(nonfinite_message(names))


def nonfinite_message(names: Sequence[str]) -> str:
    return (
        f"the VAE gives latents that are not finite for {', '.join(names)}; check that the VAE's file is complete, "
        "or give another VAE with --pretrained_vae_model_name_or_path"
    )


def _encode(base: Base, augmentation: Augmentation, sample: Sample, view: View) -> dict[str, Tensor]:
    mean, std = base.posterior(augmentation.pixels(sample, view)[None].to(base.vae.device))
    check_latents(mean + std, [sample])
    return {"mean": mean, "std": std}
