"""VAE posteriors of all samples, encoded once: mean and std, plain and mirrored, of one seeded crop per image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from flatlora_diffusion.config import RunError
from flatlora_diffusion.data.augmentation import Framing
from flatlora_diffusion.data.crops import View, mirrored_view
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.sdxl.pipeline import posterior
from flatlora_diffusion.storage.tensor_io import cached_tensors, fingerprint


class LatentCache:
    """Normalized mean and std, each (1, 4, h, w), by sample id and mirroring."""

    def __init__(self, posteriors: Mapping[tuple[str, bool], tuple[Tensor, Tensor]]) -> None:
        self._posteriors = posteriors

    def posterior(self, keys: Sequence[tuple[str, bool]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalized mean and std, each (B, 4, h, w), of the samples with id and mirroring as in `keys`."""
        means, stds = zip(*(self._posteriors[key] for key in keys), strict=True)
        return torch.cat(means).to(device), torch.cat(stds).to(device)


def encoded_latents(
    vae: AutoencoderKL,
    samples: Sequence[Sample],
    sizes: Sequence[tuple[int, int]],
    framing: Framing,
    folder: Path | None,
) -> LatentCache:
    """Encode sample i at `sizes[i]`, both flips of the crop that it keeps.

    A file in `folder` is keyed by content, crop, size and VAE, so a change makes a new one.
    """
    mark = "" if folder is None else fingerprint(vae)
    kept = [framing.kept(sample, size) for sample, size in zip(samples, sizes, strict=True)]
    posteriors = {}
    for sample, view in zip(tqdm(samples, desc="latents", disable=len(samples) < 100), kept, strict=True):
        for shown in (mirrored_view(view, False), mirrored_view(view, True)):
            key = json.dumps([sample.sha256, asdict(shown), *framing.pixel_settings, mark])
            name = f"latent-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
            path = None if folder is None else folder / name
            found = cached_tensors(path, partial(_encoded, vae, framing, sample, shown))
            posteriors[sample.id, shown.is_mirrored] = found["mean"], found["std"]
    return LatentCache(posteriors)


def not_finite(latents: Tensor, samples: Sequence[Sample]) -> list[str]:
    """The names of the images whose latents, (B, 4, h, w), are not finite."""
    bad = (~latents.isfinite()).flatten(1).any(dim=1).tolist()
    return [sample.id for sample, is_bad in zip(samples, bad, strict=True) if is_bad]


def check_latents(latents: Tensor, samples: Sequence[Sample]) -> None:
    """Raises RunError that names the images whose latents are not finite."""
    names = not_finite(latents, samples)
    if names:
        raise RunError(latents_text(names))


def latents_text(names: Sequence[str]) -> str:
    return (
        f"the VAE's latents of these images are not finite: {', '.join(names)}; look whether the VAE's file is whole, "
        "or give another one with --pretrained_vae_model_name_or_path"
    )


def _encoded(vae: AutoencoderKL, framing: Framing, sample: Sample, view: View) -> dict[str, Tensor]:
    mean, std = posterior(vae, framing.pixels(sample, view)[None].to(vae.device))
    check_latents(mean + std, [sample])
    return {"mean": mean, "std": std}
