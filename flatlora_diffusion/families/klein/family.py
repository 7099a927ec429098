"""FLUX.2 klein before it is loaded. Torch is imported only to create a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flatlora_diffusion.config import KLEIN, ModelConfig
from flatlora_diffusion.families.family import Family, Sizes
from flatlora_diffusion.families.klein import shapes
from flatlora_diffusion.families.klein.labels import labels_of
from flatlora_diffusion.families.klein.lora_names import file_names, split_name
from flatlora_diffusion.families.labels import Labels

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


UNSUPPORTED: Mapping[str, object] = {
    # Other parts and files of a base.
    "pretrained_vae_model_name_or_path": None,
    "single_file_config": None,
    "enable_xformers_memory_efficient_attention": False,
    "clip_skip": None,
    # Noise prediction and velocity of diffusion: flow matching has one target and no SNR.
    "prediction_type": None,
    "zero_terminal_snr": False,
    "do_edm_style_training": False,
    "snr_gamma": None,
    "debiased_estimation": False,
    "noise_offset": 0.0,
    "multires_noise_iterations": 0,
    "ip_noise_gamma": 0.0,
    "guidance_rescale": None,  # of images
    # Blocks of a UNet, and a file of its own for web UIs.
    "use_blora": False,
    "output_kohya_format": False,
}


class KleinFamily(Family):
    """FLUX.2 klein, base and distilled."""

    name = "FLUX.2 klein"
    pipeline = "Flux2KleinPipeline"
    usual_base = KLEIN
    hub_name = "flux.2-klein"
    denoiser = "transformer"
    denoiser_title = "transformer"
    text_parts = ("text_encoder",)
    trains_text = False
    unsupported = UNSUPPORTED
    steps = 50
    guidance = 4.0
    prefers_bf16 = True
    loader = "flatlora_diffusion.families.klein.pipeline:load_klein"
    random_loader = "flatlora_diffusion.families.klein.random_base:random_klein"

    def check_source(self, config: ModelConfig) -> None:
        from flatlora_diffusion.families.klein.loading import check_source

        self.check_sections(config)
        check_source(config)

    @property
    def file_prefixes(self) -> Mapping[str, str]:
        """Return nothing: single files are not read."""
        return {}

    def file_names(self, part: str, module: str, denoiser: Any) -> dict[str, str]:
        return file_names(module)

    def split_name(self, name: str) -> tuple[str, ...]:
        return split_name(name)

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        from flatlora_diffusion.families.klein.latents import posterior

        return posterior(vae, pixels)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        from flatlora_diffusion.families.klein.latents import decode_latents

        return decode_latents(vae, latents)

    def vae_dtype(self, config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
        import torch

        return torch.float32

    def latent_shape(self, config: ModelConfig, resolution: int) -> tuple[int, int, int]:
        return shapes.latent_shape(config, resolution)

    def prompt_numbers(self, config: ModelConfig) -> int:
        return math.prod(shapes.prompt_shape(config))

    def call_options(self, config: ModelConfig) -> dict[str, int]:
        """Return size and text length if they are not those of FLUX.2 klein, which are the pipeline's defaults."""
        side, (tokens, _) = shapes.sizes(config).native, shapes.prompt_shape(config)
        options = {} if side == shapes.SIDE else {"height": side, "width": side}
        return options if tokens == shapes.TOKENS else {**options, "max_sequence_length": tokens}

    def step_model(self, denoiser: Any, text_encoders: Mapping[str, Any], clip_skip: int | None) -> nn.Module:
        from flatlora_diffusion.families.klein.objective import Velocity

        return Velocity(denoiser)

    def step_inputs(
        self, config: ModelConfig, images: int, resolution: int, dtype: torch.dtype, trains_text: bool
    ) -> tuple[Tensor, ...]:
        import torch

        with torch.device("meta"):
            latents = torch.empty(images, *self.latent_shape(config, resolution), dtype=dtype)
            return latents, torch.empty(images), torch.empty(images, *shapes.prompt_shape(config), dtype=dtype)

    def on_meta(self, config: ModelConfig, part: str) -> Any:
        return shapes.on_meta(config, part)

    def labels(self, denoiser: Any) -> Labels:
        return labels_of(denoiser)

    def sizes(self, config: ModelConfig) -> Sizes:
        return shapes.sizes(config)

    def known_sizes(self, config: ModelConfig) -> Sizes | None:
        return shapes.known_sizes(config)
