"""Images from prompts and seeds with a base and, when one is attached, its LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from PIL import Image
from torch import nn

from flatlora_diffusion.sdxl.drawing import Drawing, sampling_names
from flatlora_diffusion.sdxl.family import TINY_FAMILY
from flatlora_diffusion.sdxl.pipeline import Sdxl, decode_latents

STEPS, GUIDANCE = 25, 5.0  # of a picture for which none are given
RESCALE = 0.7  # of guidance with zero terminal SNR, which burns colours without (arXiv:2305.08891)


@torch.no_grad()
def generate_images(  # noqa: PLR0913 (all that an image depends on)
    sdxl: Sdxl,
    prompts: Sequence[str],
    seeds: Sequence[int],
    resolution: int,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 8,
    negative_prompt: str | None = None,
    rescale: float | None = None,
) -> list[Image.Image]:
    """One image per (prompt, seed), a function of these two alone.

    Every draw of an image comes from its own seed on the CPU, so all devices and precisions start alike. Which other
    images are in its batch changes an image by rounding only, in fp32 by one of 255 levels; with `batch_size` 1 not
    at all. `rescale` of guidance is what the base asks for unless it is given.
    """
    images: list[Image.Image] = []
    pairs = list(zip(prompts, seeds, strict=True))
    with evaluating(sdxl.unet):
        for start in range(0, len(pairs), batch_size):
            part = pairs[start : start + batch_size]
            latents = sdxl.pipeline(
                prompt=[prompt for prompt, _ in part],
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(part),
                height=resolution,
                width=resolution,
                num_inference_steps=steps,
                guidance_scale=guidance,
                guidance_rescale=rescale_of(sdxl) if rescale is None else rescale,
                generator=[torch.Generator("cpu").manual_seed(seed) for _, seed in part],
                clip_skip=sdxl.clip_skip,
                output_type="latent",
            ).images
            pixels = decode_latents(sdxl.vae, latents)
            images += sdxl.pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images


def rescale_of(sdxl: Sdxl) -> float:
    """How far guidance is rescaled for this base unless told otherwise."""
    return RESCALE if sdxl.pipeline.scheduler.config.get("rescale_betas_zero_snr") else 0.0


def drawing_with(  # noqa: PLR0913 (all that an image depends on)
    sdxl: Sdxl,
    prompt: str,
    seed: int,
    size: int,
    base: str,
    loras: tuple[tuple[str, float], ...],
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    negative_prompt: str | None = None,
    rescale: float | None = None,
) -> Drawing | None:
    """What other tools are told of an image that `generate_images` has drawn so; None where they cannot draw it."""
    noise, names = sdxl.scheduler.config, sampling_names(sdxl.pipeline.scheduler)
    if names is None or sdxl.family == TINY_FAMILY:
        return None
    return Drawing(
        prompt=prompt,
        negative_prompt=negative_prompt or "",
        seed=seed,
        size=size,
        steps=steps,
        guidance=guidance,
        sampler=names[0],
        spacing=names[1],
        base=base,
        loras=loras,
        clip_skip=sdxl.clip_skip or 0,
        predicts_v=noise.prediction_type == "v_prediction",
        zero_terminal_snr=bool(noise.get("rescale_betas_zero_snr")),
        is_zeroed=negative_prompt is None and sdxl.zeroes_no_prompt,
        rescale=rescale_of(sdxl) if rescale is None else rescale,
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and each module's own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
