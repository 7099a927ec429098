"""How much of a LoRA file each tool reads: what their loaders do with the names in it, for SDXL.

Taken from running or reading those loaders; what the file holds decides, no tool is run here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flatlora_diffusion.adapter import TEXT_ATTENTION
from flatlora_diffusion.lora_import import FileLayer, ImportedLora
from flatlora_diffusion.lora_names import Style
from flatlora_diffusion.safe_reading import shown

_OUTSIDE = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")
_MOST_UNMATCHED = 12  # tensors; with more Forge takes the file for one of another model


class Support(NamedTuple):
    """How many of a file's layers a tool applies, and what its user should know."""

    tool: str
    layers: int
    note: str = ""


def tool_support(lora: ImportedLora) -> list[Support]:
    """What each tool makes of the file, in the order of a table."""
    return [Support(tool, *judge(lora)) for tool, judge in _TOOLS.items()]


def _comfyui(lora: ImportedLora) -> tuple[int, str]:
    count = _count(lora, _comfyui_knows)
    return count, "" if count == len(lora.layers) else "the others are only named in its log"


def _forge(lora: ImportedLora) -> tuple[int, str]:
    known = [layer for layer in lora.layers if _comfyui_knows(layer)]
    unmatched = len(lora.unknown) + sum(2 + (layer.alpha is not None) for layer in _others(lora, known))
    if unmatched > _MOST_UNMATCHED:
        return 0, f"it refuses the file: {unmatched} tensors have names that it does not know"
    return len(known), _family_note(lora)


def _a1111(lora: ImportedLora) -> tuple[int, str]:
    groups = defaultdict(set)
    for layer in lora.layers:
        group, _, leaf = layer.place.module.rpartition(".")
        groups[layer.place.part, group].add(leaf)

    def is_read(layer: FileLayer) -> bool:
        part, module, style = layer.place
        group, _, leaf = module.rpartition(".")
        if part == "text_encoder_2" and leaf in TEXT_ATTENTION and not groups[part, group] >= set(TEXT_ATTENTION):
            return False  # its second text encoder has q, k, v and out in one layer
        if style == "kohya-diffusers" and module.startswith(("add_embedding.", "up_blocks.0.upsamplers.")):
            return False
        return _is_kohya(layer)

    return _count(lora, is_read), _family_note(lora)


def _invokeai(lora: ImportedLora) -> tuple[int, str]:
    styles = {layer.place.style for layer in lora.layers if layer.place.part == "unet"}
    if not all(_is_kohya(layer) or _is_projection(layer) for layer in lora.layers):
        return 0, "it refuses names that do not begin as kohya's"
    if len(styles) > 1:
        return 0, "it refuses a mixture of SDXL's own and diffusers' block names"
    if not _invokeai_sees_sdxl(lora):
        return 0, "it cannot tell that this is for SDXL: no cross attention, and not both text encoders"
    return _count(lora, _is_kohya), ""


def _sdnext(lora: ImportedLora) -> tuple[int, str]:
    count = _count(lora, _is_kohya)
    return count, _family_note(lora) if count else "only with its setting lora_force_diffusers"


def _sd_scripts(lora: ImportedLora) -> tuple[int, str]:
    count = _count(lora, lambda layer: _is_kohya(layer) and not layer.place.module.startswith(_OUTSIDE))
    return count, "" if count == len(lora.layers) else "the others are dropped without a word"


def _sd_cpp(lora: ImportedLora) -> tuple[int, str]:
    def is_read(layer: FileLayer) -> bool:
        if layer.place.module.startswith("add_embedding."):
            return False
        return _is_kohya(layer) or (layer.place.part == "unet" and not layer.name.startswith("lora_"))

    has_rank_1 = any(layer.rank == 1 and layer.alpha is not None for layer in lora.layers)
    return _count(lora, is_read), "layers of rank 1 with an alpha get another scale" if has_rank_1 else ""


def _draw_things(lora: ImportedLora) -> tuple[int, str]:
    modules = [layer.place.module for layer in lora.layers if layer.place.part == "unet"]
    notes = []
    if not any(re.match(r"(down|up)_blocks\.1\.attentions\.0\..*attn2\.to_k$", module) for module in modules):
        notes.append("it may not see that this is for SDXL")
    if not any(module.startswith("mid_block.attentions.") for module in modules):
        notes.append("it takes a LoRA without the middle block for one of SSD-1B")
    count = _count(
        lora,
        lambda layer: (
            _is_kohya(layer) or (layer.place.style == "peft" and layer.place.part in ("unet", "text_encoder"))
        ),
    )
    return count, "; ".join(notes)


def _diffusers(lora: ImportedLora) -> tuple[int, str]:
    if any(name.startswith("lora_") for name in lora.unknown):
        return 0, "it refuses a file with kohya names that it does not know"
    first: dict[str, Style] = {}
    for layer in lora.layers:
        first.setdefault(layer.place.part, layer.place.style)

    def is_read(layer: FileLayer) -> bool:
        part, module, style = layer.place
        if style == "kohya-diffusers":
            return not module.startswith("add_embedding.")
        return style == "kohya-sgm" or part != "unet" or style == first[part]

    alphas = {(layer.place.part, layer.alpha) for layer in lora.layers}
    many = any(count > 1 for count in Counter(part for part, _ in alphas).values())
    return _count(lora, is_read), "all layers of a part get the commonest alpha, not their own" if many else ""


_TOOLS: dict[str, Callable[[ImportedLora], tuple[int, str]]] = {
    "ComfyUI": _comfyui,
    "AUTOMATIC1111": _a1111,
    "Forge": _forge,
    "InvokeAI": _invokeai,
    "SD.Next": _sdnext,
    "sd-scripts": _sd_scripts,
    "stable-diffusion.cpp": _sd_cpp,
    "Draw Things": _draw_things,
    "diffusers": _diffusers,
}


def _count(lora: ImportedLora, is_read: Callable[[FileLayer], bool]) -> int:
    return sum(map(is_read, lora.layers))


def _others(lora: ImportedLora, known: Sequence[FileLayer]) -> list[FileLayer]:
    return [layer for layer in lora.layers if layer not in known]


def _is_kohya(layer: FileLayer) -> bool:
    """Whether the name is one that readers of kohya's layout know: text encoders with their `text_model`."""
    return layer.name.startswith("lora_unet_") or (layer.name.startswith("lora_te") and _has_wrapper(layer))


def _has_wrapper(layer: FileLayer) -> bool:
    return "text_model" in layer.name


def _is_projection(layer: FileLayer) -> bool:
    """Whether it is the second text encoder's projection by kohya's name, which few tools know."""
    return layer.name == "lora_te2_text_projection"


def _comfyui_knows(layer: FileLayer) -> bool:
    """Its map has attention of the UNet as `processor.to_q` only, other layers also by their plain paths."""
    if layer.place.part != "unet":
        return _has_wrapper(layer) or _is_projection(layer)
    return _is_kohya(layer) or layer.place.style == "processor" or ".to_" not in layer.place.module


def _invokeai_sees_sdxl(lora: ImportedLora) -> bool:
    """It looks for cross attention, a third block of a transformer, or the attention of both text encoders."""
    text = {layer.place.part for layer in lora.layers if ".self_attn." in layer.place.module}
    return {"text_encoder", "text_encoder_2"} <= text or any(
        re.search(r"attn2\.to_[kv]$|transformer_blocks\.([2-9]|1\d)\.", layer.place.module) for layer in lora.layers
    )


def _family_note(lora: ImportedLora) -> str:
    """A1111, Forge and SD.Next go by this entry; without it, or without any metadata, they guess."""
    version = lora.file.metadata.get("ss_base_model_version")
    if not lora.file.metadata or (version or "").startswith("sdxl_"):
        return ""
    says = "have no ss_base_model_version" if version is None else f"call its base {shown(version)}"
    return f"hidden while an SDXL model is loaded: the metadata {says}"
