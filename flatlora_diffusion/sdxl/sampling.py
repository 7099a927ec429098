"""Image generation from prompts and seeds, with the base and any attached LoRA."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from PIL import Image
from torch import Tensor, nn

from flatlora_diffusion.config import TEXT_PARTS, RunError
from flatlora_diffusion.sdxl.drawing import Drawing, sampling_names
from flatlora_diffusion.sdxl.family import TINY_FAMILY
from flatlora_diffusion.sdxl.pipeline import Sdxl, decode_latents

logger = logging.getLogger(__name__)

STEPS, GUIDANCE = 25, 5.0  # defaults
RESCALE = 0.7  # guidance rescale for zero terminal SNR, against overexposure (arXiv:2305.08891)


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
    must_be_finite: bool = False,
) -> list[Image.Image]:
    """Generate one image per (prompt, seed) pair.

    The noise comes from a CPU generator per image, so that all devices and precisions start from the same noise. The
    other images in a batch affect an image by rounding only, in fp32 by one of 255 levels.

    Args:
        rescale: guidance rescale; the base's default if None.
        must_be_finite: raise RunError for an image that is not finite. Otherwise it is black, and a warning says so.
    """
    images: list[Image.Image] = []
    pairs = list(zip(prompts, seeds, strict=True))
    with eval_mode(sdxl.unet):
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
            if failure := _overflow_text(sdxl, [prompt for prompt, _ in part], latents, pixels):
                if must_be_finite:
                    raise RunError(failure)
                logger.warning("%s", failure)
                pixels = pixels.masked_fill(~pixels.isfinite(), -1)
            images += sdxl.pipeline.image_processor.postprocess(pixels, output_type="pil")
    return images


def _overflow_text(sdxl: Sdxl, prompts: Sequence[str], latents: Tensor, pixels: Tensor) -> str | None:
    """Say which images are not finite, because a model overflows in its precision, and what to change; else None."""
    is_finite = pixels.isfinite().flatten(1).all(dim=1).tolist()
    if all(is_finite):
        return None
    named = ", ".join(repr(prompt) for prompt, is_right in zip(prompts, is_finite, strict=True) if not is_right)
    if latents.isfinite().all():
        model, dtype, remedy = "VAE", sdxl.vae.dtype, "check or leave out --pretrained_vae_model_name_or_path"
    elif sdxl.unet.dtype == torch.float16:
        model, dtype = "UNet", sdxl.unet.dtype
        remedy = "give another --mixed_precision, for class images --prior_generation_precision"
    else:
        model, dtype, remedy = "UNet", sdxl.unet.dtype, "the LoRA has diverged; train with a lower --learning_rate"
    precision = str(dtype).removeprefix("torch.")
    return f"the image of {named} is black, because the {model} is not finite in {precision}: {remedy}"


def rescale_of(sdxl: Sdxl) -> float:
    """Return the default guidance rescale of this base."""
    return RESCALE if sdxl.pipeline.scheduler.config.get("rescale_betas_zero_snr") else 0.0


def describe_drawing(  # noqa: PLR0913 (all that an image depends on)
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
    """Describe an image of `generate_images` for other tools; None if they cannot reproduce it."""
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
        is_zeroed=negative_prompt is None and sdxl.zeros_empty_prompt,
        rescale=rescale_of(sdxl) if rescale is None else rescale,
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode, and restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def eval_on_unet_device(sdxl: Sdxl) -> Iterator[None]:
    """Move VAE and text encoders to the UNet's device in eval mode, and restore both afterwards."""
    parts = [getattr(sdxl.pipeline, part) for part in (*TEXT_PARTS, "vae")]
    devices = [part.device for part in parts]
    with ExitStack() as stack:
        for part, device in zip(parts, devices, strict=True):
            if device != sdxl.unet.device:
                part.to(sdxl.unet.device)
                stack.callback(part.to, device)
            stack.enter_context(eval_mode(part))
        yield
