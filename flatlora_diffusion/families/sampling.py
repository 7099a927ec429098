"""Image generation from prompts and seeds, with a base and any attached LoRA."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from PIL import Image
from torch import Tensor

from flatlora_diffusion.config import RunError
from flatlora_diffusion.families.base import Base, eval_mode
from flatlora_diffusion.families.drawing import ImageSettings

logger = logging.getLogger(__name__)


@torch.no_grad()
def generate_images(
    base: Base,
    prompts: Sequence[str],
    seeds: Sequence[int],
    settings: ImageSettings,
    batch_size: int = 8,
    must_be_finite: bool = False,
) -> list[Image.Image]:
    """Generate one image per (prompt, seed) pair.

    The noise comes from a CPU generator per image, so that all devices and precisions start from the same noise. The
    other images in a batch affect an image by rounding only, in fp32 by one of 255 levels.

    Args:
        must_be_finite: raise RunError for an image that is not finite. Otherwise it is black, and a warning says so.
    """
    images: list[Image.Image] = []
    pairs = list(zip(prompts, seeds, strict=True))
    with eval_mode(base.denoiser):
        for start in range(0, len(pairs), batch_size):
            part_prompts, part_seeds = zip(*pairs[start : start + batch_size], strict=True)
            latents = base.sample_latents(part_prompts, part_seeds, settings)
            pixels = base.decode(latents)
            if failure := _overflow_text(base, part_prompts, latents, pixels):
                if must_be_finite:
                    raise RunError(failure)
                logger.warning("%s", failure)
                pixels = pixels.masked_fill(~pixels.isfinite(), -1)
            images += base.pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images


@contextmanager
def eval_on_denoiser_device(base: Base) -> Iterator[None]:
    """Move VAE and text encoders to the denoiser's device in eval mode, and restore both afterwards."""
    parts = [*base.text_encoders.values(), base.vae]
    devices = [part.device for part in parts]
    with ExitStack() as stack:
        for part, device in zip(parts, devices, strict=True):
            if device != base.denoiser.device:
                part.to(base.denoiser.device)
                stack.callback(part.to, device)
            stack.enter_context(eval_mode(part))
        yield


def _overflow_text(base: Base, prompts: Sequence[str], latents: Tensor, pixels: Tensor) -> str | None:
    """Say which images are not finite, because a model overflows in its precision, and what to change; else None."""
    is_finite = pixels.isfinite().flatten(1).all(dim=1).tolist()
    if all(is_finite):
        return None
    named = ", ".join(repr(prompt) for prompt, is_right in zip(prompts, is_finite, strict=True) if not is_right)
    model, dtype = base.family.denoiser_title, base.denoiser.dtype
    if latents.isfinite().all():
        model, dtype, remedy = "VAE", base.vae.dtype, "check or leave out --pretrained_vae_model_name_or_path"
    elif dtype == torch.float16:
        remedy = "give another --mixed_precision, for class images --prior_generation_precision"
    else:
        remedy = "the LoRA has diverged; train with a lower --learning_rate"
    precision = str(dtype).removeprefix("torch.")
    return f"the image of {named} is black, because the {model} is not finite in {precision}: {remedy}"
