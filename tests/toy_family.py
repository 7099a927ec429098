"""A family with nothing of SDXL: a small random FLUX.2 transformer and flow matching, without pooled embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from flatlora_diffusion.config import ModelConfig, ObjectiveConfig
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.drawing import Drawing, ImageSettings
from flatlora_diffusion.families.family import Family, Sizes
from flatlora_diffusion.families.labels import Labels
from flatlora_diffusion.families.objective import Objective

PIPELINE = "ToyPipeline"
CHANNELS, TOKENS, WIDTH = 12, 5, 24
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class ToyFamily(Family):
    name = "the toy family"
    pipeline = PIPELINE
    usual_base = "someone/toy"
    hub_name = "someone/toy"
    denoiser = "transformer"
    denoiser_title = "transformer"
    text_parts = ("text_encoder",)
    trains_text = False
    steps = 4
    guidance = 1.0
    prefers_bf16 = False
    loader = random_loader = "toy_family:load_toy"
    file_prefixes: Mapping[str, str] = {}

    def check_source(self, config: ModelConfig) -> None:
        pass

    def on_meta(self, config: ModelConfig, part: str) -> Any:
        with torch.device("meta"):
            return {"transformer": transformer, "text_encoder": ToyText, "vae": ToyVae}[part]()

    def labels(self, denoiser: Any) -> Labels:
        return Labels("toy", "toy_v1", "toy/lora", "Unknown", is_demo=True)

    def sizes(self, config: ModelConfig) -> Sizes:
        return Sizes(32, 8)

    def known_sizes(self, config: ModelConfig) -> Sizes:
        return self.sizes(config)

    def file_names(self, part: str, module: str, denoiser: Any) -> dict[str, str]:
        return {f"transformer.{module}": "peft"}

    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        latents = F.pixel_unshuffle(vae(pixels), 2)
        return latents, torch.zeros_like(latents)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return F.interpolate(F.pixel_shuffle(latents, 2), scale_factor=4)

    def vae_dtype(self, config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def latent_shape(self, config: ModelConfig, resolution: int) -> tuple[int, int, int]:
        return CHANNELS, resolution // 8, resolution // 8

    def prompt_numbers(self, config: ModelConfig) -> int:
        return TOKENS * (WIDTH + 4)

    def step_model(self, denoiser: Any, text_encoders: Mapping[str, Any], clip_skip: int | None) -> nn.Module:
        raise NotImplementedError

    def step_inputs(
        self, config: ModelConfig, images: int, resolution: int, dtype: torch.dtype, trains_text: bool
    ) -> tuple[Tensor, ...]:
        raise NotImplementedError


class ToyText(nn.Module):
    """Embeds each of the first letters of a prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(256, WIDTH)
        self.device = torch.device("cpu")

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, prompts: Sequence[str]) -> Tensor:
        ids = [[*prompt.encode()[:TOKENS], *[0] * TOKENS][:TOKENS] for prompt in prompts]
        output: Tensor = self.table(torch.tensor(ids))
        return output


class ToyVae(nn.Module):
    """Latents are the means of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def forward(self, pixels: Tensor) -> Tensor:
        return F.avg_pool2d(pixels, 4) * self.scale


class ToyPipeline:
    """The parts, named as in FLUX.2's pipeline."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.transformer, self.text_encoder, self.vae = transformer(), ToyText(), ToyVae()
        for part in (self.transformer, self.text_encoder, self.vae):
            part.requires_grad_(False).eval()


@dataclass(frozen=True)
class FlowMatching(Objective):
    """x_t = (1 - t) x + t n; the target is n - x."""

    loss_type = "l2"

    def draw(self, latents: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(latents.shape, generator=rng), torch.rand(len(latents), generator=rng)

    def compared(
        self, model: nn.Module, batch: Batch, noise: Tensor, timesteps: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        t = timesteps.view(-1, 1, 1, 1)
        noisy = (1 - t) * batch.latents + t * noise
        height, width = noisy.shape[-2:]
        ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1))
        output = model(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            timestep=timesteps,
            guidance=None,
            encoder_hidden_states=batch.prompts["embeds"],
            txt_ids=batch.prompts["text_ids"],
            img_ids=ids.expand(len(noisy), -1, -1),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(noisy.shape), noise - batch.latents, None

    def unweighted(self) -> FlowMatching:
        return self


@dataclass(frozen=True)
class Toy(Base):
    pipeline: ToyPipeline

    family = ToyFamily()
    clip_skip = None
    resolution, size_step, latent_step = 32, 8, 8
    zeros_empty_prompt = False
    max_tokens = TOKENS

    def count_tokens(self, prompt: str) -> int:
        return len(prompt.split())

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        ids = torch.zeros(len(prompts), TOKENS, 4, dtype=torch.long)
        ids[..., 3] = torch.arange(TOKENS)
        return {"embeds": self.pipeline.text_encoder(prompts), "text_ids": ids}

    def geometry(self, original_sizes: Any, crops: Any, size: Any) -> dict[str, Tensor]:
        return {}

    def objective(self, config: ObjectiveConfig | None = None) -> FlowMatching:
        return FlowMatching()

    def timesteps_at(self, shares: Tensor) -> Tensor:
        return shares

    def trained_model(self, trains_text: bool) -> nn.Module:
        return self.pipeline.transformer

    def sample_latents(self, prompts: Sequence[str], seeds: Sequence[int], settings: ImageSettings) -> Tensor:
        raise NotImplementedError

    def describe_image(self, *of_image: Any) -> Drawing | None:
        return None


def transformer() -> Flux2Transformer2DModel:
    """Two blocks of both kinds."""
    return Flux2Transformer2DModel(
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=8,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=False,
    )


def load_toy(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Toy:
    return Toy(ToyPipeline())


def save_toy(folder: Path) -> Path:
    """Write the file by which the registry finds the family."""
    folder.mkdir()
    (folder / "model_index.json").write_text(f'{{"_class_name": "{PIPELINE}"}}')
    return folder
