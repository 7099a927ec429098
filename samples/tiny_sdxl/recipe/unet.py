"""The base's text encoders and UNet, trained together from scratch on cached latents of flat icons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from flatlora_diffusion.storage.rng import generator
from samples.tiny_sdxl.recipe.captions import DROPPED, STYLE_WORDS, VOCABULARY, caption
from samples.tiny_sdxl.recipe.icons import FLAT_STYLES, Concept, render
from samples.tiny_sdxl.recipe.loop import Schedule, train
from samples.tiny_sdxl.recipe.vae import encode, to_pixels

BATCH = 96
SNR_GAMMA = 5.0
# Of the captions of FLAT_STYLES; the other sets' drawings always have their style word, so that "a flat icon of X"
# stands for three drawings and not for six.
STYLED_RATE = 0.6
BEST_KNOWN = 2.0  # how much oftener the best known concepts are drawn than the others
OTHER_SETS = 0.5  # and how often a drawing of the other sets
VARIANTS = 12  # cached latents per picture: small shifts, half of them flipped
NOISE_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
WIDTHS = (96, 128)  # of the two text encoders; unequal, so that swapped weights cannot load


class Base(nn.Module):
    """Both text encoders and the UNet, conditioned the way StableDiffusionXLPipeline conditions them."""

    def __init__(self) -> None:
        super().__init__()
        shared: dict[str, Any] = {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 77,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        first, second = WIDTHS
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=first,
                intermediate_size=4 * first,
                num_hidden_layers=3,
                num_attention_heads=3,
                projection_dim=first,
                **shared,
            )
        )
        self.text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=second,
                intermediate_size=4 * second,
                num_hidden_layers=3,
                num_attention_heads=4,
                projection_dim=second,
                hidden_act="gelu",
                **shared,
            )
        )
        self.unet = UNet2DConditionModel(
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(64, 96, 160),
            layers_per_block=2,
            transformer_layers_per_block=1,
            attention_head_dim=(2, 3, 5),  # the number of heads, as in SDXL's own config
            cross_attention_dim=sum(WIDTHS),
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=second + 6 * 32,
            use_linear_projection=True,
        )

    def forward(
        self, ids: Tensor, ids_2: Tensor, kept: Tensor, latents: Tensor, timesteps: Tensor, time_ids: Tensor
    ) -> Tensor:
        """Predict the noise; rows with `kept` 0 get zero embeddings."""
        one = self.text_encoder(ids, output_hidden_states=True)
        two = self.text_encoder_2(ids_2, output_hidden_states=True)
        prompt_embeds = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1) * kept[:, None, None]
        added = {"text_embeds": two.text_embeds * kept[:, None], "time_ids": time_ids}
        return self.unet(latents, timesteps, prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]


@dataclass(frozen=True)
class Picture:
    """One drawing: what it shows, in which set's style, and how often it is drawn relative to the others."""

    concept: Concept
    style: str
    weight: float

    @property
    def svg(self) -> str:
        return (self.concept.flat_svgs | self.concept.more_svgs)[self.style]

    def caption(self, rng: torch.Generator) -> str:
        """A random caption, with the set's style word in STYLED_RATE of the captions or, of other sets, in all."""
        is_styled = self.style not in FLAT_STYLES or float(torch.rand((), generator=rng)) < STYLED_RATE
        return caption(self.concept, rng, STYLE_WORDS[self.style] if is_styled else None)


@dataclass(frozen=True)
class Data:
    """Cached latents (pictures, VARIANTS, 4, 16, 16) in fp32, and the picture of each row."""

    latents: Tensor
    pictures: Sequence[Picture]


def list_pictures(concepts: Sequence[Concept], best_known: Sequence[Concept]) -> list[Picture]:
    """Every flat drawing of `concepts`."""
    often = {concept.hexcode for concept in best_known}
    return [
        Picture(
            concept,
            style,
            (BEST_KNOWN if concept.hexcode in often else 1.0) * (1.0 if style in FLAT_STYLES else OTHER_SETS),
        )
        for concept in concepts
        for style in concept.flat_svgs | concept.more_svgs
    ]


def cache_latents(vae: AutoencoderKL, pictures: Sequence[Picture]) -> Data:
    """The pictures with their latents, normalized per channel."""
    mean = torch.tensor(vae.config.latents_mean)[:, None, None]
    std = torch.tensor(vae.config.latents_std)[:, None, None]
    return Data((encode_pictures(vae, pictures) - mean) / std, pictures)


def encode_pictures(vae: AutoencoderKL | AutoencoderKLFlux2, pictures: Sequence[Picture]) -> Tensor:
    """The latents of VARIANTS shifted or flipped copies of every picture, (pictures, VARIANTS, 4, 16, 16)."""
    latents = []
    for picture in tqdm(pictures, desc="latents", unit="picture"):
        rng = generator("cpu", 0, picture.concept.hexcode, picture.style)
        latents.append(encode(vae, _variants(render(picture.svg), rng)))
    return torch.stack(latents)


def _variants(image: np.ndarray[Any, np.dtype[np.uint8]], rng: torch.Generator) -> Tensor:
    pixels = torch.nn.functional.pad(to_pixels(image[None]), (3, 3, 3, 3), value=1.0)[0]
    size = image.shape[0]
    copies = []
    for index in range(VARIANTS):
        dy, dx = torch.randint(0, 7, (2,), generator=rng).tolist() if index > 1 else (3, 3)
        copy = pixels[:, dy : dy + size, dx : dx + size]
        copies.append(copy.flip(-1) if index % 2 else copy)
    return torch.stack(copies)


def train_unet(data: Data, tokenizers: Path, schedule: Schedule, state_file: Path, start: Path | None = None) -> Base:
    """Train on min-SNR weighted noise prediction; returns the model with its averaged weights.

    It begins with random weights, or with those of the saved base `start`.
    """
    torch.manual_seed(0)
    base = Base() if start is None else load_base(start)
    weights = torch.tensor([picture.weight for picture in data.pictures])
    scheduler = DDPMScheduler(num_train_timesteps=1000, **NOISE_SCHEDULE)
    tokenizer, tokenizer_2 = (
        CLIPTokenizer.from_pretrained(tokenizers / name) for name in ("tokenizer", "tokenizer_2")
    )

    def loss_at(step: int) -> Tensor:
        rng = generator("cpu", 0, "unet", step)
        rows = torch.multinomial(weights, BATCH, replacement=True, generator=rng)
        latents = data.latents[rows, torch.randint(0, VARIANTS, (BATCH,), generator=rng)]
        texts = [data.pictures[row].caption(rng) for row in rows.tolist()]
        kept = torch.tensor([float(text != DROPPED) for text in texts])
        noise = torch.randn(latents.shape, generator=rng)
        timesteps = torch.randint(0, 1000, (BATCH,), generator=rng)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        # At this size a CPU is faster with plain attention than with the fused one, and with contiguous tensors than
        # with channels_last.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            output = base(
                _ids(tokenizer, texts), _ids(tokenizer_2, texts), kept, noisy, timesteps, _time_ids(BATCH, rng)
            )
        error = (output.float() - noise).square().mean(dim=(1, 2, 3))
        return (error * (SNR_GAMMA / compute_snr(scheduler, timesteps).clamp(min=SNR_GAMMA))).mean()

    train(base, loss_at, schedule, state_file)
    return base.eval()


def load_base(folder: Path) -> Base:
    """The text encoders and the UNet saved in `folder`, in fp32, ready to be trained on."""
    base = Base()
    for name, part in base.named_children():
        loaded: Any = type(part)
        part.load_state_dict(loaded.from_pretrained(folder / name, dtype=torch.float32).state_dict())
    return base


def _ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids


def _time_ids(batch: int, rng: torch.Generator) -> Tensor:
    """SDXL's (original size, crop, target size): any original size from 64 to 512, so that none is strange later."""
    sizes = 2.0 ** (6 + 3 * torch.rand(batch, 1, generator=rng)) * (torch.rand(batch, 1, generator=rng) < 0.5)
    sizes = sizes.clamp(min=64).round()
    crops = torch.randint(0, 9, (batch, 2), generator=rng) * (torch.rand(batch, 1, generator=rng) < 0.3)
    return torch.cat([sizes, sizes, crops, torch.full((batch, 2), 64.0)], dim=1)


def save_base(base: Base, folder: Path) -> None:
    """Write the whole pipeline in fp16 into `folder`, which holds the VAE and the tokenizers already."""
    # Not from_pretrained: it notes in the saved config the folder that the VAE was read from.
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
    vae.half().load_state_dict(load_file(folder / "vae" / SAFETENSORS_WEIGHTS_NAME))
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=base.text_encoder.half(),
        text_encoder_2=base.text_encoder_2.half(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        unet=base.unet.half().to(memory_format=torch.contiguous_format),
        scheduler=EulerDiscreteScheduler(num_train_timesteps=1000, **NOISE_SCHEDULE),
    )
    pipeline.save_pretrained(folder)
