"""Predicts how much of a LoRA file for FLUX.2 klein diffusers and ComfyUI read, by their loaders' rules for key names.

The rules are those of diffusers 0.42 (`Flux2LoraLoaderMixin`) and of ComfyUI in April and August 2026
(`comfy/lora.py`). Other tools were not looked at.
"""

from __future__ import annotations

from flatlora_diffusion.lora_files.fused import SplitFile
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora

_DIFFUSERS_PREFIXES = ("transformer", "diffusion_model", "base_model")
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def diffusers_layers(lora: ImportedLora) -> tuple[int, str]:
    """Return the number of layers that diffusers applies, and a note."""
    file = lora.file.whole if isinstance(lora.file, SplitFile) else lora.file
    keys, count = list(file.entries), len(lora.layers)
    if any(key.endswith(".lora_down.weight") for key in keys):
        originals = sum(layer.target.style == "kohya-sgm" for layer in lora.layers)
        return originals, "" if originals == count else "it ignores the other layers"
    if not all("lora" in key for key in keys):
        return 0, "it rejects a file with other tensors than LoRA's, such as alpha"
    prefixes = {key.partition(".")[0] for key in keys}
    if any(prefixes == {prefix} for prefix in _DIFFUSERS_PREFIXES):
        return count, ""
    return 0, f"it loads layers with one of the prefixes {', '.join(_DIFFUSERS_PREFIXES)} only"


def comfyui_layers(lora: ImportedLora) -> tuple[int, str]:
    """Return the number of layers that ComfyUI applies, and a note."""
    count = sum(map(_comfyui_maps, lora.layers))
    return count, "" if count == len(lora.layers) else "it logs the other layers and ignores them"


def _comfyui_maps(layer: FileLayer) -> bool:
    module = layer.target.module
    flat = module.replace(".", "_")
    of_diffusers = f"transformer.{module}", module, f"lycoris_{flat}", f"lora_transformer_{flat}"
    if layer.name in of_diffusers:
        return module.startswith(_BLOCKS)
    return layer.name.startswith(("diffusion_model.", "lora_unet_")) and module not in layer.name
