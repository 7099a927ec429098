"""A loaded SDXL base, and the encoding of prompts and images into the UNet's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler, EDMEulerScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.sdxl.family import Family, family_of
from flatlora_diffusion.sdxl.loading import load_pipeline
from flatlora_diffusion.sdxl.objective import is_edm_scheduler
from flatlora_diffusion.sdxl.shapes import checked_size


@dataclass(frozen=True)
class Sdxl:
    """A frozen SDXL base.

    The VAE is fp32, or fp16 if another VAE is given that supports it; the other parts share one dtype. `clip_skip`
    layers are skipped beyond SDXL's penultimate layer for every prompt.
    """

    pipeline: StableDiffusionXLPipeline
    scheduler: DDPMScheduler | EDMEulerScheduler
    clip_skip: int | None = None

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipeline.vae

    @property
    def family(self) -> Family:
        """The family of the base: SDXL or the tiny base."""
        return family_of(self.unet)

    @property
    def resolution(self) -> int:
        """The image size in pixels that the base was trained at."""
        return int(self.unet.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_step(self) -> int:
        """Image sides must be a multiple of this: the VAE's factor times the UNet's."""
        return int(self.pipeline.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def zeros_empty_prompt(self) -> bool:
        """Whether the unconditional input is zeros, as in SDXL, or the embedding of the empty prompt."""
        return bool(self.pipeline.config.force_zeros_for_empty_prompt)

    def checked_resolution(self, resolution: int | None) -> int:
        """Return `resolution`, or the base's native resolution. Raises ConfigError for an unsupported size."""
        return checked_size(resolution or self.resolution, self.size_step)

    def move(self, parts: Iterable[str], device: torch.device) -> None:
        """Move models of the pipeline, by their names in it."""
        for part in parts:
            getattr(self.pipeline, part).to(device)


def load_sdxl(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Sdxl:
    """Load the base onto `device`, frozen and in eval mode. Raises ConfigError if it is not an SDXL model."""
    return wrap_pipeline(load_pipeline(config, device, dtype), config)


def wrap_pipeline(pipeline: StableDiffusionXLPipeline, config: ModelConfig) -> Sdxl:
    """Wrap a loaded pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    # A separate scheduler, because sampling changes the state of the pipeline's.
    kind = type(pipeline.scheduler) if is_edm_scheduler(pipeline.scheduler) else DDPMScheduler
    return Sdxl(pipeline, kind.from_config(pipeline.scheduler.config), config.clip_skip)


@torch.no_grad()
def encode_prompts(sdxl: Sdxl, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return prompt embeddings (B, 77, D) and pooled embeddings (B, P), as the pipeline computes them."""
    prompt_embeds, _, pooled, _ = sdxl.pipeline.encode_prompt(
        list(prompts), do_classifier_free_guidance=False, clip_skip=sdxl.clip_skip
    )
    return prompt_embeds, pooled


@torch.no_grad()
def posterior(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and std of the normalized latents, (B, 4, H/f, W/f) fp32, of pixels (B, 3, H, W) in [-1, 1]."""
    distribution = vae.encode(pixels.to(vae.dtype)).latent_dist
    mean, std = _latent_statistics(vae, distribution.mean.device)
    scale = vae.config.scaling_factor / std
    return (distribution.mean.float() - mean) * scale, distribution.std.float() * scale


def encode_images(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return the posterior's mean: normalized latents (B, 4, H/f, W/f) fp32 of pixels (B, 3, H, W) in [-1, 1]."""
    mean, _ = posterior(vae, pixels)
    return mean


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decode normalized latents in the VAE's dtype to pixels (B, 3, H, W) fp32.

    Images are decoded one by one, and in overlapping tiles of 1024 pixels if they are larger.
    """
    mean, std = _latent_statistics(vae, latents.device)
    vae.enable_tiling()  # not for encoding: the model would learn the seams
    try:
        return vae.decode((latents.float() / vae.config.scaling_factor * std + mean).to(vae.dtype)).sample.float()
    finally:
        vae.disable_tiling()


def add_time_ids(
    original_sizes: Sequence[tuple[int, int]],
    crops_top_left: Sequence[tuple[int, int]],
    target_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """Return SDXL's size conditioning, (B, 6): original (h, w), crop (top, left), target (h, w)."""
    rows = [(*size, *crop, *target_size) for size, crop in zip(original_sizes, crops_top_left, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _latent_statistics(vae: AutoencoderKL, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and std of the latents per channel, (1, C, 1, 1); 0 and 1 if the VAE has none, as SDXL's."""
    channels = vae.config.latent_channels
    mean = getattr(vae.config, "latents_mean", None) or [0.0] * channels
    std = getattr(vae.config, "latents_std", None) or [1.0] * channels
    return torch.tensor(mean, device=device).view(1, -1, 1, 1), torch.tensor(std, device=device).view(1, -1, 1, 1)
