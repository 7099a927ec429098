"""A loaded SDXL base, and the encoding of prompts and images into the UNet's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from flatlora_diffusion.config import ModelConfig, ObjectiveConfig
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.sdxl.denoiser import denoiser_of
from flatlora_diffusion.families.sdxl.drawing import SdxlDrawing, sampling_names
from flatlora_diffusion.families.sdxl.family import SdxlFamily
from flatlora_diffusion.families.sdxl.loading import load_pipeline
from flatlora_diffusion.families.sdxl.objective import SdxlObjective, is_edm_scheduler, objective_of

RESCALE = 0.7  # guidance rescale for zero terminal SNR, against overexposure (arXiv:2305.08891)


@dataclass(frozen=True)
class Sdxl(Base):
    """A frozen SDXL base.

    The VAE is fp32, or fp16 if another VAE is given that supports it; the other parts share one dtype. `clip_skip`
    layers are skipped beyond SDXL's penultimate layer for every prompt.
    """

    pipeline: StableDiffusionXLPipeline
    scheduler: DDPMScheduler | EDMEulerScheduler
    clip_skip: int | None = None

    family = SdxlFamily()

    @property
    def resolution(self) -> int:
        return int(self.denoiser.config.sample_size * self.latent_step)

    @property
    def size_step(self) -> int:
        """The VAE's factor times the UNet's."""
        return int(self.latent_step * 2 ** (len(self.denoiser.config.block_out_channels) - 1))

    @property
    def latent_step(self) -> int:
        return int(self.pipeline.vae_scale_factor)

    @property
    def predicts_v(self) -> bool:
        return bool(self.scheduler.config.prediction_type == "v_prediction")

    @property
    def has_zero_terminal_snr(self) -> bool:
        return bool(self.scheduler.config.get("rescale_betas_zero_snr"))

    @property
    def zeros_empty_prompt(self) -> bool:
        return bool(self.pipeline.config.force_zeros_for_empty_prompt)

    @property
    def tokenizers(self) -> tuple[Any, Any]:
        """The tokenizers of both text encoders."""
        return self.pipeline.tokenizer, self.pipeline.tokenizer_2

    @property
    def max_tokens(self) -> int:
        return int(min(tokenizer.model_max_length for tokenizer in self.tokenizers))

    def count_tokens(self, prompt: str) -> int:
        """Return the tokens of the longer tokenization, with start and end."""
        return 2 + max(len(tokenizer.tokenize(prompt)) for tokenizer in self.tokenizers)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return prompt_embeds (B, 77, D) and pooled_prompt_embeds (B, P)."""
        prompt_embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, clip_skip=self.clip_skip
        )
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}

    def tokenize(self, prompts: Sequence[str], mask: Tensor) -> dict[str, Tensor]:
        """Return input_ids (B, 2, 77) and caption_mask (B,)."""
        ids = [tokenize(tokenizer, prompts) for tokenizer in self.tokenizers]
        return {"input_ids": torch.stack(ids, dim=1), "caption_mask": mask}

    def geometry(
        self, original_sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]], size: tuple[int, int]
    ) -> dict[str, Tensor]:
        """Return SDXL's size conditioning, add_time_ids (B, 6): original (h, w), crop (top, left), target (h, w)."""
        rows = [(*original, *crop, *size) for original, crop in zip(original_sizes, crops, strict=True)]
        return {"add_time_ids": torch.tensor(rows, dtype=torch.float32)}

    def objective(self, config: ObjectiveConfig | None = None) -> SdxlObjective:
        if config is None:
            return SdxlObjective(self.scheduler, edm=is_edm_scheduler(self.scheduler))
        return objective_of(config, self.scheduler)

    def timesteps_at(self, shares: Tensor) -> Tensor:
        return (shares * self.scheduler.config.num_train_timesteps).long()

    def trained_model(self, trains_text: bool) -> nn.Module:
        encoders = list(self.text_encoders.values()) if trains_text else []
        return denoiser_of(self.denoiser, encoders, self.clip_skip)

    def sample_latents(self, prompts: Sequence[str], seeds: Sequence[int], settings: ImageSettings) -> Tensor:
        negative, rescale = settings.negative_prompt, settings.rescale
        latents: Tensor = self.pipeline(
            prompt=list(prompts),
            negative_prompt=None if negative is None else [negative] * len(prompts),
            height=settings.resolution,
            width=settings.resolution,
            num_inference_steps=self.steps_of(settings),
            guidance_scale=self.guidance_of(settings),
            guidance_rescale=self.default_rescale if rescale is None else rescale,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            clip_skip=self.clip_skip,
            output_type="latent",
        ).images
        return latents

    @property
    def default_rescale(self) -> float:
        """The default guidance rescale of this base."""
        return RESCALE if self.pipeline.scheduler.config.get("rescale_betas_zero_snr") else 0.0

    def describe_image(
        self, prompt: str, seed: int, settings: ImageSettings, base: str, loras: tuple[tuple[str, float], ...]
    ) -> SdxlDrawing | None:
        names = sampling_names(self.pipeline.scheduler)
        if names is None or self.labels.is_demo:
            return None
        negative, rescale = settings.negative_prompt, settings.rescale
        return SdxlDrawing(
            prompt=prompt,
            negative_prompt=negative or "",
            seed=seed,
            size=settings.resolution,
            steps=self.steps_of(settings),
            guidance=self.guidance_of(settings),
            sampler=names[0],
            spacing=names[1],
            base=base,
            loras=loras,
            clip_skip=self.clip_skip or 0,
            predicts_v=self.predicts_v,
            zero_terminal_snr=self.has_zero_terminal_snr,
            is_zeroed=negative is None and self.zeros_empty_prompt,
            rescale=self.default_rescale if rescale is None else rescale,
        )

    @contextmanager
    def twice_differentiable(self) -> Iterator[None]:
        processors = dict(self.denoiser.attn_processors)
        self.denoiser.set_attn_processor(AttnProcessor())
        try:
            yield
        finally:
            self.denoiser.set_attn_processor(processors)


def load_sdxl(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Sdxl:
    """Load the base onto `device`, frozen and in eval mode. Raises ConfigError if it is not an SDXL model."""
    return wrap_pipeline(load_pipeline(config, device, dtype), config)


def wrap_pipeline(pipeline: StableDiffusionXLPipeline, config: ModelConfig) -> Sdxl:
    """Wrap a loaded pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    # A separate scheduler, because sampling changes the state of the pipeline's.
    kind = type(pipeline.scheduler) if is_edm_scheduler(pipeline.scheduler) else DDPMScheduler
    return Sdxl(pipeline, kind.from_config(pipeline.scheduler.config), config.clip_skip)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return token ids (B, 77), truncated and padded as in StableDiffusionXLPipeline."""
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
