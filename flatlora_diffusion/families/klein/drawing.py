"""A ComfyUI workflow that reproduces an image: noise (from the CPU), noise levels, text and guidance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from flatlora_diffusion.families.comfyui import Kind, Nodes, page_of
from flatlora_diffusion.families.drawing import NOISE_FROM, PARAMETERS, Drawing, a1111_text
from flatlora_diffusion.storage.run_dir import COMFYUI, COMFYUI_API

# File names in ComfyUI's own examples.
TEXT_ENCODER_4B, TEXT_ENCODER_9B, VAE = "qwen_3_4b.safetensors", "qwen_3_8b.safetensors", "flux2-vae.safetensors"


@dataclass(frozen=True)
class KleinDrawing(Drawing):
    """The generation parameters of an image.

    sampler: name for A1111's text, which other tools read; A1111 itself has no FLUX.2.
    base: file name of the transformer without suffix.
    text_encoder: file name.
    loras: name and strength of each.
    """

    prompt: str
    negative_prompt: str
    seed: int
    size: int
    steps: int
    guidance: float
    sampler: str
    base: str
    text_encoder: str = TEXT_ENCODER_4B
    loras: tuple[tuple[str, float], ...] = ()

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
        }


_CONDITIONING = {"positive": "CONDITIONING", "negative": "CONDITIONING"}
_KINDS = {
    "UNETLoader": Kind({}, ("MODEL",), ("unet_name", "weight_dtype")),
    "CLIPLoader": Kind({}, ("CLIP",), ("clip_name", "type", "device")),
    "VAELoader": Kind({}, ("VAE",), ("vae_name",)),
    "LoraLoaderModelOnly": Kind({"model": "MODEL"}, ("MODEL",), ("lora_name", "strength_model")),
    "CLIPTextEncode": Kind({"clip": "CLIP"}, ("CONDITIONING",), ("text",)),
    "CFGGuider": Kind({"model": "MODEL", **_CONDITIONING}, ("GUIDER",), ("cfg",)),
    "KSamplerSelect": Kind({}, ("SAMPLER",), ("sampler_name",)),
    "Flux2Scheduler": Kind({}, ("SIGMAS",), ("steps", "width", "height")),
    "RandomNoise": Kind({}, ("NOISE",), ("noise_seed", "control_after_generate")),
    "EmptyFlux2LatentImage": Kind({}, ("LATENT",), ("width", "height", "batch_size")),
    "SamplerCustomAdvanced": Kind(
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS", "latent_image": "LATENT"},
        ("LATENT", "LATENT"),
        (),
    ),
    "VAEDecode": Kind({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",), ()),
    "SaveImage": Kind({"images": "IMAGE"}, (), ("filename_prefix",)),
}


def parameters_text(drawing: KleinDrawing) -> str:
    """Return the image's parameters in A1111's format."""
    values: dict[str, Any] = {
        "Steps": drawing.steps,
        "Sampler": drawing.sampler,
        "CFG scale": drawing.guidance,
        "Seed": drawing.seed,
        "Size": f"{drawing.size}x{drawing.size}",
        "Model": drawing.base,
        "RNG": NOISE_FROM,
    }
    return a1111_text(drawing.prompt, drawing.negative_prompt, drawing.loras, values)


def workflow_for_api(drawing: KleinDrawing) -> dict[str, Any]:
    """Return the workflow in the format of ComfyUI's server: nodes by number, links as [node, output].

    Prompts are not escaped: ComfyUI reads no weights in prompts of FLUX.2.
    """
    nodes = Nodes()
    add = nodes.add
    model = [add("UNETLoader", unet_name=f"{drawing.base}.safetensors", weight_dtype="default"), 0]
    clip = [add("CLIPLoader", clip_name=drawing.text_encoder, type="flux2", device="default"), 0]
    vae = [add("VAELoader", vae_name=VAE), 0]
    for name, strength in drawing.loras:
        lora = {"lora_name": f"{name}.safetensors", "strength_model": strength}
        model = [add("LoraLoaderModelOnly", **lora, model=model), 0]
    positive = [add("CLIPTextEncode", text=drawing.prompt, clip=clip), 0]
    negative = [add("CLIPTextEncode", text=drawing.negative_prompt, clip=clip), 0]
    size = {"width": drawing.size, "height": drawing.size}
    sampled = add(
        "SamplerCustomAdvanced",
        guider=[add("CFGGuider", cfg=drawing.guidance, model=model, positive=positive, negative=negative), 0],
        sampler=[add("KSamplerSelect", sampler_name="euler"), 0],
        sigmas=[add("Flux2Scheduler", steps=drawing.steps, **size), 0],
        noise=[add("RandomNoise", noise_seed=drawing.seed), 0],
        latent_image=[add("EmptyFlux2LatentImage", **size, batch_size=1), 0],
    )
    pixels = add("VAEDecode", samples=[sampled, 0], vae=vae)
    add("SaveImage", filename_prefix=drawing.loras[0][0] if drawing.loras else drawing.base, images=[pixels, 0])
    return nodes.by_number


def workflow_for_page(drawing: KleinDrawing) -> dict[str, Any]:
    """Return the workflow in the format of ComfyUI's page, which loads it from a dropped file or image."""
    return page_of(workflow_for_api(drawing), _KINDS)


def has_workflow(pipeline: Any) -> bool:
    """Whether ComfyUI's nodes for FLUX.2 make the same noise levels and latents: 128 channels, 16 pixels a token."""
    scheduler = pipeline.scheduler
    config = scheduler.config
    return (
        type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
        and bool(config.use_dynamic_shifting)
        and config.time_shift_type == "exponential"
        and not config.shift_terminal
        and pipeline.transformer.config.in_channels == 128
        and pipeline.vae_scale_factor == 8
    )
