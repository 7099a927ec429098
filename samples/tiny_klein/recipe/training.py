"""Train text encoder and transformer together, from scratch, by flow matching on cached latents of flat icons."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast

from flatlora_diffusion.storage.rng import generator
from samples.tiny_klein.recipe.base import SIDE, Base
from samples.tiny_klein.recipe.text import deepen, tokenize
from samples.tiny_sdxl.recipe.loop import Schedule, adamw, train
from samples.tiny_sdxl.recipe.unet import VARIANTS, Data

BATCH = 48
# How often each number of text tokens is trained on: nearly always the one recommended, and at times longer ones, for
# the padding of klein's usual 512 to do little harm. Batches have about as many tokens at any length.
TOKENS = 32
LENGTHS = {TOKENS: 0.85, 64: 0.1, 128: 0.04, 512: 0.01}
PADDED = 48  # tokens that flatlora pads captions to: those of samples/icons_3d have up to 33
BEST_KNOWN = (
    3.0  # how much oftener than in tiny SDXL's training the flat drawings of the best known concepts are drawn
)
LOGIT_MEAN, LOGIT_STD = 0.3, 1.2  # of the noise levels, which have a logit-normal distribution


@torch.no_grad()
def normalize(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Patch the cached `latents` and normalize them by their batch statistics, which the VAE keeps."""
    patches = Flux2KleinPipeline._patchify_latents(latents.flatten(0, 1))
    vae.bn.running_mean.copy_(patches.mean(dim=(0, 2, 3)))
    vae.bn.running_var.copy_(patches.var(dim=(0, 2, 3)))
    vae.bn.num_batches_tracked.fill_(1)
    normal = nn.functional.batch_norm(patches, vae.bn.running_mean, vae.bn.running_var, eps=vae.bn.eps)
    return normal.unflatten(0, latents.shape[:2])


def train_base(data: Data, tokenizer: Qwen2TokenizerFast, schedule: Schedule, state_file: Path) -> Base:
    """Train with velocities as targets; returns the model with its averaged weights."""
    torch.manual_seed(0)
    base = Base()
    base.transformer.compile(dynamic=False)
    weights = torch.tensor([picture.weight for picture in data.pictures])
    often = (weights > 1).float() * (BEST_KNOWN - 1) + 1

    def loss_at(step: int) -> Tensor:
        rng = generator("cpu", 0, "tiny klein", step)
        length = list(LENGTHS)[int(torch.multinomial(torch.tensor(list(LENGTHS.values())), 1, generator=rng))]
        count = BATCH * (SIDE * SIDE + TOKENS) // (SIDE * SIDE + length)
        rows = torch.multinomial(weights * often, count, replacement=True, generator=rng)
        latents = data.latents[rows, torch.randint(0, VARIANTS, (count,), generator=rng)]
        texts = [data.pictures[row].caption(rng) for row in rows.tolist()]
        noise = torch.randn(latents.shape, generator=rng)
        sigmas = torch.sigmoid(LOGIT_MEAN + LOGIT_STD * torch.randn(count, generator=rng))
        noised = torch.lerp(latents, noise, sigmas[:, None, None, None])
        with torch.autocast("cpu", torch.bfloat16):
            velocity = base(*tokenize(tokenizer, texts, length), noised, sigmas)
        return (velocity.float() - (noise - latents)).square().mean()

    train(base, loss_at, schedule, state_file, optimizers(base, schedule))
    return base.eval()


def optimizers(base: Base, schedule: Schedule) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings, norms and the last layer."""
    outside = {base.text_encoder.model.embed_tokens.weight, base.transformer.proj_out.weight}
    inside = [p for p in base.parameters() if p.ndim == 2 and p not in outside]
    others = [p for p in base.parameters() if p.ndim != 2 or p in outside]
    muon = torch.optim.Muon(inside, schedule.learning_rate, schedule.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw(others, schedule)]


def save_base(base: Base, vae: AutoencoderKLFlux2, tokenizer: Qwen2TokenizerFast, folder: Path) -> None:
    """Write the whole pipeline in bfloat16 into `folder`."""
    tokenizer.model_max_length = PADDED
    pipeline = Flux2KleinPipeline(
        # klein's: noise levels are shifted by the number of tokens and of steps
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae.bfloat16(),
        text_encoder=deepen(base.text_encoder).bfloat16(),
        tokenizer=tokenizer,
        transformer=base.transformer.bfloat16(),
        is_distilled=False,
    )
    pipeline.save_pretrained(folder)
