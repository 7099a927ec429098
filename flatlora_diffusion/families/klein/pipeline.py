"""A loaded FLUX.2 klein, and the encoding of prompts and images into the transformer's inputs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor, nn

from flatlora_diffusion.config import ModelConfig, ObjectiveConfig
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.drawing import Drawing, ImageSettings, a1111_sampler
from flatlora_diffusion.families.flow_matching import noise_levels
from flatlora_diffusion.families.klein.drawing import TEXT_ENCODER_4B, TEXT_ENCODER_9B, KleinDrawing, has_workflow
from flatlora_diffusion.families.klein.family import KleinFamily
from flatlora_diffusion.families.klein.labels import KLEIN_9B
from flatlora_diffusion.families.klein.latents import PATCH, from_tokens, vae_factor
from flatlora_diffusion.families.klein.loading import LAYERS, load_pipeline
from flatlora_diffusion.families.klein.objective import KleinObjective
from flatlora_diffusion.families.klein.shapes import native_size, prompt_length

logger = logging.getLogger(__name__)

DISTILLED_STEPS, NO_GUIDANCE = 4, 1.0
TINY_STEPS = 25  # of the included base
DISTILLED = (
    "this FLUX.2 klein is distilled to few steps, which training undoes: train on "
    "black-forest-labs/FLUX.2-klein-base-4B and use the LoRA on FLUX.2-klein-4B"
)


@dataclass(frozen=True)
class Klein(Base):
    """A frozen FLUX.2 klein. The VAE is fp32; the other parts share one dtype.

    levels: the noise levels of training, rising.
    """

    pipeline: Flux2KleinPipeline
    levels: Tensor

    family = KleinFamily()
    clip_skip = None

    @property
    def resolution(self) -> int:
        return native_size(self.vae.config)

    @property
    def size_step(self) -> int:
        return self.latent_step

    @property
    def latent_step(self) -> int:
        """The VAE's factor times the side of a patch."""
        return vae_factor(self.vae) * PATCH

    @property
    def is_distilled(self) -> bool:
        """Whether the base generates in few steps without guidance."""
        return bool(self.pipeline.config.is_distilled)

    @property
    def zeros_empty_prompt(self) -> bool:
        return False

    @property
    def max_tokens(self) -> int:
        """The length that all prompts are padded to."""
        return prompt_length(self.pipeline.tokenizer.model_max_length)

    def count_tokens(self, prompt: str) -> int:
        """Return the tokens of the prompt in the chat template."""
        tokenizer: Any = self.pipeline.tokenizer
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(tokenizer.tokenize(text))

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return prompt_embeds (B, L, 3D): hidden states of three layers of the text encoder, side by side."""
        prompt_embeds, _ = self.pipeline.encode_prompt(
            list(prompts),
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_tokens,
            text_encoder_out_layers=LAYERS,
        )
        return {"prompt_embeds": prompt_embeds}

    def geometry(
        self, original_sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        return {}

    def objective(self, config: ObjectiveConfig | None = None) -> KleinObjective:
        if config is None:
            return KleinObjective(self.levels)
        self.family.check_sections(config)
        return KleinObjective.of(config, self.levels)

    def timesteps_at(self, shares: Tensor) -> Tensor:
        return self.levels.to(shares.device)[(shares * len(self.levels)).long()]

    def trained_model(self, trains_text: bool) -> nn.Module:
        """Return the transformer; warns of a distilled base."""
        assert not trains_text
        if self.is_distilled:
            logger.warning("%s", DISTILLED)
        model: nn.Module = self.denoiser
        return model

    def sample_latents(self, prompts: Sequence[str], seeds: Sequence[int], settings: ImageSettings) -> Tensor:
        guidance, side = self.guidance_of(settings), settings.resolution // self.latent_step
        negative = [settings.negative_prompt or ""] * len(prompts) if guidance > NO_GUIDANCE else None
        shape = self.denoiser.config.in_channels, side, side
        # In fp32, so that all precisions start from the same noise.
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        last: dict[str, Tensor] = {}

        def keep_last(pipeline: Any, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            last.update(tensors)
            return {}

        self.pipeline(
            prompt_embeds=self.encode_prompts(prompts)["prompt_embeds"],
            negative_prompt_embeds=None if negative is None else self.encode_prompts(negative)["prompt_embeds"],
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=self.steps_of(settings),
            guidance_scale=guidance,
            latents=noise,
            output_type="latent",  # the pipeline returns them without normalization, rounded to the model's precision
            callback_on_step_end=keep_last,
        )
        return from_tokens(last["latents"], side, side)

    def describe_image(
        self, prompt: str, seed: int, settings: ImageSettings, base: str, loras: tuple[tuple[str, float], ...]
    ) -> Drawing | None:
        if not has_workflow(self.pipeline):
            return None
        return KleinDrawing(
            prompt=prompt,
            negative_prompt=settings.negative_prompt or "",
            seed=seed,
            size=settings.resolution,
            steps=self.steps_of(settings),
            guidance=self.guidance_of(settings),
            sampler=a1111_sampler(type(self.pipeline.scheduler).__name__),
            base=base,
            text_encoder=TEXT_ENCODER_9B if self.labels == KLEIN_9B else TEXT_ENCODER_4B,
            loras=loras,
        )

    def steps_of(self, settings: ImageSettings) -> int:
        if settings.steps is None and self.is_distilled:
            return DISTILLED_STEPS
        return TINY_STEPS if settings.steps is None and self.labels.is_demo else super().steps_of(settings)

    def guidance_of(self, settings: ImageSettings) -> float:
        return NO_GUIDANCE if self.is_distilled else super().guidance_of(settings)


def load_klein(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Klein:
    """Load the base onto `device`, frozen and in eval mode. Raises ConfigError if it is not a FLUX.2 klein."""
    Klein.family.check_sections(config)
    return wrap_pipeline(load_pipeline(config, device, dtype))


def wrap_pipeline(pipeline: Flux2KleinPipeline) -> Klein:
    """Wrap a loaded pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    return Klein(pipeline, noise_levels(pipeline.scheduler))
