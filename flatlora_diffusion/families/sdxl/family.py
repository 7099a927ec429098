"""SDXL before it is loaded. Torch is imported only to create a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flatlora_diffusion.config import SDXL, TEXT_PARTS, ModelConfig
from flatlora_diffusion.families.family import Family, Sizes
from flatlora_diffusion.families.labels import Labels
from flatlora_diffusion.families.sdxl import shapes
from flatlora_diffusion.families.sdxl.labels import labels_of
from flatlora_diffusion.families.sdxl.lora_names import file_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class SdxlFamily(Family):
    """SDXL and the models derived from it."""

    name = "SDXL"
    pipeline = "StableDiffusionXLPipeline"
    usual_base = SDXL
    denoiser = "unet"
    denoiser_title = "UNet"
    text_parts = TEXT_PARTS
    trains_text = True
    unsupported: Mapping[str, object] = {"weighting_scheme": "none"}  # of flow matching
    steps = 25
    guidance = 5.0
    prefers_bf16 = False
    loader = "flatlora_diffusion.families.sdxl.pipeline:load_sdxl"
    random_loader = "flatlora_diffusion.families.sdxl.random_base:random_sdxl"
    single_file_saver = "flatlora_diffusion.families.sdxl.single_file:save_single_file"

    def check_source(self, config: ModelConfig) -> None:
        from flatlora_diffusion.families.sdxl.loading import check_source

        check_source(config)

    @property
    def file_prefixes(self) -> Mapping[str, str]:
        from flatlora_diffusion.families.sdxl.single_file import PREFIXES

        return PREFIXES

    def file_names(self, part: str, module: str, denoiser: Any) -> dict[str, str]:
        return file_names(part, module, denoiser.config.layers_per_block)

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        from flatlora_diffusion.families.sdxl.vae import posterior

        return posterior(vae, pixels)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        from flatlora_diffusion.families.sdxl.vae import decode_latents

        return decode_latents(vae, latents)

    def vae_dtype(self, config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
        from flatlora_diffusion.families.sdxl.vae import vae_dtype

        settings = {} if config.pretrained_vae_model_name_or_path is None else shapes.part_settings(config, "vae")
        return vae_dtype(settings, dtype)

    def latent_shape(self, config: ModelConfig, resolution: int) -> tuple[int, int, int]:
        side = resolution // shapes.vae_factor(config)
        return int(shapes.part_settings(config, "vae")["latent_channels"]), side, side

    def prompt_numbers(self, config: ModelConfig) -> int:
        """Return the size of 77 tokens of both encoders, and of the pooled embedding of the second."""
        first, second = (shapes.part_settings(config, part) for part in self.text_parts)
        return int(shapes.TOKENS * (first["hidden_size"] + second["hidden_size"]) + second["projection_dim"])

    def step_model(self, denoiser: Any, text_encoders: Mapping[str, Any], clip_skip: int | None) -> nn.Module:
        from flatlora_diffusion.families.sdxl.denoiser import Conditioned, Denoiser

        if not text_encoders:
            return Conditioned(denoiser)
        return Denoiser(denoiser, list(text_encoders.values()), clip_skip)

    def step_inputs(
        self, config: ModelConfig, images: int, resolution: int, dtype: torch.dtype, trains_text: bool
    ) -> tuple[Tensor, ...]:
        from flatlora_diffusion.families.sdxl.denoiser import meta_inputs

        return meta_inputs(config, images, self.latent_shape(config, resolution), dtype, trains_text)

    def on_meta(self, config: ModelConfig, part: str) -> Any:
        return shapes.on_meta(config, part)

    def labels(self, denoiser: Any) -> Labels:
        return labels_of(denoiser)

    def sizes(self, config: ModelConfig) -> Sizes:
        return shapes.sizes(config)

    def known_sizes(self, config: ModelConfig) -> Sizes | None:
        return shapes.known_sizes(config)
