"""The SDXL parts: load, freeze and place them; turn prompts and images into what the UNet is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor

from flatlora_diffusion.config import SAMPLES, ConfigError, ModelConfig

TINY = "tiny"


@dataclass(frozen=True)
class Sdxl:
    """A frozen SDXL base. The VAE is fp32 (half-precision SDXL VAEs give black images); the rest is in one dtype."""

    pipeline: StableDiffusionXLPipeline
    scheduler: DDPMScheduler

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipeline.vae

    @property
    def resolution(self) -> int:
        """The image size in pixels that the base was trained at."""
        return int(self.unet.config.sample_size * self.pipeline.vae_scale_factor)

    @property
    def size_step(self) -> int:
        """Image sides must be a multiple of this: the VAE's factor times the UNet's."""
        return int(self.pipeline.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))


def base_path(name_or_path: str) -> str:
    """The folder or hub id behind a `--pretrained_model_name_or_path`; `tiny` is the base that ships with us."""
    return str(SAMPLES / "tiny_sdxl") if name_or_path == TINY else name_or_path


def load_sdxl(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Sdxl:
    """Load the base onto `device`, frozen and in eval mode. Raises ConfigError when there is no SDXL model there."""
    path = base_path(config.pretrained_model_name_or_path)
    pipeline = _load_pipeline(path, config, dtype)
    if config.pretrained_vae_model_name_or_path is not None:
        pipeline.vae = _load_vae(config.pretrained_vae_model_name_or_path)
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        part.requires_grad_(False)
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return Sdxl(pipeline, scheduler)


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusionXLPipeline, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Prompt embeddings (B, 77, D) and pooled embeddings (B, P), just as the pipeline makes them for inference."""
    prompt_embeds, _, pooled, _ = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
    return prompt_embeds, pooled


@torch.no_grad()
def encode_images(vae: AutoencoderKL, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
    """Normalized latents (B, 4, H/f, W/f) in fp32 of pixels (B, 3, H, W) in [-1, 1].

    `noise` (same shape as the latents, N(0, 1)) samples the posterior; without it the latents are the mean.
    """
    posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    latents = posterior.mean if noise is None else posterior.mean + posterior.std * noise.to(posterior.std)
    mean, std = _latent_statistics(vae, latents.device)
    return (latents.float() - mean) / std * vae.config.scaling_factor


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) of normalized latents, decoded in the VAE's own fp32 whatever the latents' dtype."""
    mean, std = _latent_statistics(vae, latents.device)
    return vae.decode(latents.float() / vae.config.scaling_factor * std + mean).sample


def add_time_ids(
    original_sizes: Sequence[tuple[int, int]],
    crops_top_left: Sequence[tuple[int, int]],
    target_size: tuple[int, int],
    device: torch.device,
) -> Tensor:
    """SDXL's size conditioning, (B, 6): original (height, width), crop (top, left), target (height, width)."""
    rows = [(*size, *crop, *target_size) for size, crop in zip(original_sizes, crops_top_left, strict=True)]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _latent_statistics(vae: AutoencoderKL, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and std of the latents per channel, (1, C, 1, 1); 0 and 1 for a VAE without them, such as SDXL's."""
    channels = vae.config.latent_channels
    mean = getattr(vae.config, "latents_mean", None) or [0.0] * channels
    std = getattr(vae.config, "latents_std", None) or [1.0] * channels
    return torch.tensor(mean, device=device).view(1, -1, 1, 1), torch.tensor(std, device=device).view(1, -1, 1, 1)


def _load_pipeline(path: str, config: ModelConfig, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    what = f"pretrained_model_name_or_path={config.pretrained_model_name_or_path!r}"
    if Path(path).is_dir() and not (Path(path) / "model_index.json").is_file():
        raise ConfigError(f"{what} is a folder without model_index.json; give a folder saved by diffusers or a hub id")
    try:
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            path,
            dtype={"default": dtype, "vae": torch.float32},
            revision=config.revision,
            variant=config.variant,
            add_watermarker=False,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} is no SDXL base that can be loaded: {_first_line(error)}") from error
    if getattr(pipeline, "text_encoder_2", None) is None:
        raise ConfigError(f"{what} is not SDXL: it has no second text encoder")
    return pipeline


def _load_vae(path: str) -> AutoencoderKL:
    try:
        return AutoencoderKL.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"pretrained_vae_model_name_or_path={path!r} cannot be loaded: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
