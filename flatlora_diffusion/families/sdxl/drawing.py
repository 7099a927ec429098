"""Generation parameters of an image for other tools: ComfyUI workflows and A1111's text.

They reproduce the same image there: noise (from the CPU), noise levels and conditioning. An image whose sampler has no
equivalent there has none.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flatlora_diffusion.families.comfyui import Kind, Nodes, page_of
from flatlora_diffusion.families.drawing import NOISE_FROM, PARAMETERS, SAMPLERS, Drawing, a1111_text, escaped
from flatlora_diffusion.storage.run_dir import A1111_TEXT, COMFYUI, COMFYUI_API

_SPACINGS = {"leading": ("ddim_uniform", "DDIM"), "trailing": ("simple", "Simple"), "linspace": ("normal", "Normal")}
_KARRAS = ("karras", "Karras")


@dataclass(frozen=True)
class SdxlDrawing(Drawing):
    """The generation parameters of an image.

    sampler, spacing: names in ComfyUI and in A1111.
    base: file name of the base without suffix.
    loras: name and strength of each.
    clip_skip: layers skipped beyond SDXL's penultimate layer.
    is_zeroed: the negative conditioning is zeros, as SDXL was trained, instead of the embedding of an empty text.
    rescale: guidance rescale (arXiv:2305.08891), which A1111 does not support.
    """

    prompt: str
    negative_prompt: str
    seed: int
    size: int
    steps: int
    guidance: float
    sampler: tuple[str, str]
    spacing: tuple[str, str]
    base: str
    loras: tuple[tuple[str, float], ...] = ()
    clip_skip: int = 0
    predicts_v: bool = False
    zero_terminal_snr: bool = False
    is_zeroed: bool = False
    rescale: float = 0.0

    def png_chunks(self) -> dict[str, str]:
        return {
            PARAMETERS: parameters_text(self),
            "prompt": json.dumps(workflow_for_api(self)),
            "workflow": json.dumps(workflow_for_page(self)),
        }

    def files(self) -> dict[str, str]:
        return {
            COMFYUI: json.dumps(workflow_for_page(self), indent=2) + "\n",
            COMFYUI_API: json.dumps(workflow_for_api(self), indent=2) + "\n",
            A1111_TEXT: parameters_text(self) + "\n",
        }


_KINDS = {
    "CheckpointLoaderSimple": Kind({}, ("MODEL", "CLIP", "VAE"), ("ckpt_name",)),
    "LoraLoader": Kind(
        {"model": "MODEL", "clip": "CLIP"}, ("MODEL", "CLIP"), ("lora_name", "strength_model", "strength_clip")
    ),
    "ModelSamplingDiscrete": Kind({"model": "MODEL"}, ("MODEL",), ("sampling", "zsnr")),
    "RescaleCFG": Kind({"model": "MODEL"}, ("MODEL",), ("multiplier",)),
    "CLIPSetLastLayer": Kind({"clip": "CLIP"}, ("CLIP",), ("stop_at_clip_layer",)),
    "CLIPTextEncode": Kind({"clip": "CLIP"}, ("CONDITIONING",), ("text",)),
    "ConditioningZeroOut": Kind({"conditioning": "CONDITIONING"}, ("CONDITIONING",), ()),
    "EmptyLatentImage": Kind({}, ("LATENT",), ("width", "height", "batch_size")),
    "KSampler": Kind(
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        ("LATENT",),
        ("seed", "control_after_generate", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    ),
    "VAEDecode": Kind({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",), ()),
    "SaveImage": Kind({"images": "IMAGE"}, (), ("filename_prefix",)),
}


def sampling_names(scheduler: Any) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return sampler and spacing of a scheduler as named in ComfyUI and A1111; None without an equivalent."""
    sampler = SAMPLERS.get(type(scheduler).__name__)
    is_karras = scheduler.config.get("use_karras_sigmas")
    spacing = _KARRAS if is_karras else _SPACINGS.get(scheduler.config.get("timestep_spacing"))
    return None if sampler is None or spacing is None else (sampler, spacing)


def parameters_text(drawing: SdxlDrawing) -> str:
    """Return A1111's parameters text, which its page `PNG Info` and many other tools read."""
    values: dict[str, Any] = {
        "Steps": drawing.steps,
        "Sampler": drawing.sampler[1],
        "Schedule type": drawing.spacing[1],
        "CFG scale": drawing.guidance,
        "Seed": drawing.seed,
        "Size": f"{drawing.size}x{drawing.size}",
        "Model": drawing.base,
        "RNG": NOISE_FROM,
    }
    return a1111_text(drawing.prompt, drawing.negative_prompt, drawing.loras, values)


def workflow_for_api(drawing: SdxlDrawing) -> dict[str, Any]:
    """Return the workflow in the format of ComfyUI's server: nodes by number, links as [node, output]."""
    nodes = Nodes()
    add = nodes.add
    base = add("CheckpointLoaderSimple", ckpt_name=f"{drawing.base}.safetensors")
    model, clip = [base, 0], [base, 1]
    for name, strength in drawing.loras:
        strengths = {"strength_model": strength, "strength_clip": strength}
        lora = add("LoraLoader", lora_name=f"{name}.safetensors", **strengths, model=model, clip=clip)
        model, clip = [lora, 0], [lora, 1]
    if drawing.predicts_v:
        model = [add("ModelSamplingDiscrete", sampling="v_prediction", zsnr=drawing.zero_terminal_snr, model=model), 0]
    if drawing.rescale:
        model = [add("RescaleCFG", multiplier=drawing.rescale, model=model), 0]
    if drawing.clip_skip:
        clip = [add("CLIPSetLastLayer", stop_at_clip_layer=-2 - drawing.clip_skip, clip=clip), 0]
    positive = [add("CLIPTextEncode", text=escaped(drawing.prompt, "()"), clip=clip), 0]
    negative = [add("CLIPTextEncode", text=escaped(drawing.negative_prompt, "()"), clip=clip), 0]
    if drawing.is_zeroed:
        negative = [add("ConditioningZeroOut", conditioning=negative), 0]
    latents = [add("EmptyLatentImage", width=drawing.size, height=drawing.size, batch_size=1), 0]
    sampled = add(
        "KSampler",
        seed=drawing.seed,
        steps=drawing.steps,
        cfg=drawing.guidance,
        sampler_name=drawing.sampler[0],
        scheduler=drawing.spacing[0],
        denoise=1.0,
        model=model,
        positive=positive,
        negative=negative,
        latent_image=latents,
    )
    pixels = add("VAEDecode", samples=[sampled, 0], vae=[base, 2])
    add("SaveImage", filename_prefix=drawing.loras[0][0] if drawing.loras else drawing.base, images=[pixels, 0])
    return nodes.by_number


def workflow_for_page(drawing: SdxlDrawing) -> dict[str, Any]:
    """Return the workflow in the format of ComfyUI's page, which loads it from a dropped file or image."""
    return page_of(workflow_for_api(drawing), _KINDS)
