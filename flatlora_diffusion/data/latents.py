"""VAE posteriors of all samples, encoded once: mean and std, plain and mirrored, of one seeded crop per image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from flatlora_diffusion.data.crops import View, mirrored_view
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.ground.atomic import writing_into
from flatlora_diffusion.ground.files import fingerprint, load_tensors, save_tensors
from flatlora_diffusion.sdxl.pipeline import posterior


class LatentCache:
    """Keyed by sample id; a file in `folder` is keyed by content, crop, size and VAE, so a change makes a new one."""

    def __init__(
        self,
        vae: AutoencoderKL,
        samples: Sequence[Sample],
        views: Sequence[View],
        load_pixels: Callable[[Sample, View], Tensor],
        settings: Sequence[str],
        folder: Path | None,
    ) -> None:
        """`views[i]` is the crop of sample i, `load_pixels` makes it; `settings` are what else changes the pixels."""
        mark = "" if folder is None else fingerprint(vae)
        self._posteriors: dict[tuple[str, bool], tuple[Tensor, Tensor]] = {}
        for sample, view in zip(tqdm(samples, desc="latents", disable=len(samples) < 100), views, strict=True):
            for is_mirrored in (False, True):
                shown = mirrored_view(view, is_mirrored)
                key = hashlib.sha256(json.dumps([sample.sha256, asdict(shown), *settings, mark]).encode()).hexdigest()
                path = None if folder is None else folder / f"latent-{key[:32]}.safetensors"
                if path is not None and path.is_file():
                    tensors, _ = load_tensors(path)
                    self._posteriors[sample.id, is_mirrored] = tensors["mean"], tensors["std"]
                    continue
                pixels = load_pixels(sample, shown)[None].to(vae.device)
                mean, std = (value.cpu() for value in posterior(vae, pixels))
                self._posteriors[sample.id, is_mirrored] = mean, std
                if path is not None:
                    with writing_into(path.parent, "embedding_cache_dir"):
                        save_tensors(path, {"mean": mean, "std": std})

    def posterior(self, keys: Sequence[tuple[str, bool]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Normalized mean and std, each (B, 4, h, w), of the samples with id and mirroring as in `keys`."""
        means, stds = zip(*(self._posteriors[key] for key in keys), strict=True)
        return torch.cat(means).to(device), torch.cat(stds).to(device)
