"""How much of a LoRA file each tool reads: what their loaders do with the names in it, for SDXL.

Taken from running or reading those loaders; what the file holds decides, no tool is run here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import nn

from flatlora_diffusion.adapter.lora import TEXT_ATTENTION
from flatlora_diffusion.lora_files.names import BaseNames, Place, names_of
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora
from flatlora_diffusion.lora_files.safe_reading import shown
from flatlora_diffusion.lora_files.scale import PEFT_PREFIX
from flatlora_diffusion.lora_tools.diffusers_support import diffusers_support
from flatlora_diffusion.sdxl.family import TINY_FAMILY, family_of

_MIXED = "it refuses a mixture of SDXL's own and diffusers' block names"
_OUTSIDE = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")
_MOST_UNMATCHED = 12  # tensors; with more Forge takes the file for one of another model
_INVOKEAI_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_")
_INVOKEAI_DROPS = "bundle_emb"  # the embeddings of new tokens
_SDXL_BLOCKS = re.compile(r"lora_unet_((input|output)_blocks|middle_block|time_embed|label_emb|out)_\d")


class Support(NamedTuple):
    """How many of a file's layers a tool applies, and what its user should know."""

    tool: str
    layers: int
    note: str = ""


def tool_support(lora: ImportedLora) -> list[Support]:
    """How much of the file each tool applies, in the order of a table."""
    family = family_of(lora.base.unet)
    if family == TINY_FAMILY:
        count, note = diffusers_support(lora)
        own = Support("diffusers", count, note or "with the tiny base only")
        nothing = f"no other tool can use it: its base is {family.name}"
        return [own if tool == own.tool else Support(tool, 0, nothing) for tool in _TOOLS]
    supports = [Support(tool, *judge(lora)) for tool, judge in _TOOLS.items()]
    return [row if row.tool == "diffusers" else _with_strength(lora, row) for row in supports]


def _with_strength(lora: ImportedLora, row: Support) -> Support:
    """`row` with the factor by which it misses the LoRA's strength, for tools that read no metadata."""
    factors = sorted({1 / layer.scale for layer in lora.layers if layer.alpha is None and layer.scale != 1})
    if not factors or not row.layers:
        return row
    times = " to ".join(f"{factor:.3g}" for factor in dict.fromkeys((factors[0], factors[-1])))
    note = f"at {times} times its strength, since its alpha is in no tensor; `export` puts it there"
    return row._replace(note="; ".join(filter(None, (row.note, note))))


def _comfyui(lora: ImportedLora) -> tuple[int, str]:
    count = _count(lora, _comfyui_knows)
    return count, "" if count == len(lora.layers) else "the others are only named in its log"


def _forge(lora: ImportedLora) -> tuple[int, str]:
    known = [layer for layer in lora.layers if _forge_knows(layer)]
    others = [layer for layer in lora.layers if layer not in known]
    names = _forge_names(lora.base)
    strangers = [key for key in lora.unknown if not _is_change_of(key, names)]
    unmatched = len(strangers) + sum(2 + (layer.alpha is not None) for layer in others)
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
    ends = defaultdict(set)
    for key in lora.file.entries:
        if not key.startswith(_INVOKEAI_DROPS):
            name, _, end = key.partition(".")
            ends[name].add(end)
    if not all(name.startswith(_INVOKEAI_PREFIXES) for name in ends):
        return 0, "it refuses names that do not begin as kohya's"
    if len({_SDXL_BLOCKS.match(name) is None for name in ends if name.startswith("lora_unet_")}) > 1:
        return 0, _MIXED
    if not all(map(_invokeai_reads, ends.values())):
        return 0, "it refuses the file: it has tensors whose names end in a way that it does not know"
    if not any(_invokeai_sees_sdxl(layer) for layer in lora.layers):
        return 0, "it cannot tell that this is for SDXL: there is no cross attention"
    return _count(lora, _is_kohya), ""


def _sdnext(lora: ImportedLora) -> tuple[int, str]:
    def is_read(layer: FileLayer) -> bool:  # its first text encoder has the names of either transformers
        return _is_kohya(layer) or (layer.name.startswith("lora_te1_") and _has_kohya_end(layer))

    count = _count(lora, is_read)
    return count, _family_note(lora) if count else "only with its setting lora_force_diffusers"


def _sd_scripts(lora: ImportedLora) -> tuple[int, str]:
    styles = {layer.place.style for layer in lora.layers if _is_in_block(layer) and _is_kohya(layer)}
    if {"kohya-sgm", "kohya-diffusers"} <= styles:
        return 0, _MIXED
    count = _count(lora, lambda layer: _is_kohya(layer) and not layer.place.module.startswith(_OUTSIDE))
    return count, "" if count == len(lora.layers) else "the others are dropped without a word"


def _sd_cpp(lora: ImportedLora) -> tuple[int, str]:
    def is_read(layer: FileLayer) -> bool:
        if layer.place.part != "unet":
            return layer.name.startswith("lora_") and _is_full(layer)
        return not layer.place.module.startswith("add_embedding.") and PEFT_PREFIX not in layer.name

    has_rank_1 = any(layer.rank == 1 and layer.alpha is not None for layer in lora.layers)
    return _count(lora, is_read), "layers of rank 1 with an alpha get another scale" if has_rank_1 else ""


def _draw_things(lora: ImportedLora) -> tuple[int, str]:
    modules = [layer.place.module for layer in lora.layers if layer.place.part == "unet"]
    notes = []
    if not any(re.match(r"(down|up)_blocks\.1\.attentions\.0\..*attn2\.to_k$", module) for module in modules):
        notes.append("it may not see that this is for SDXL")
    if not any(module.startswith("mid_block.attentions.") for module in modules):
        notes.append("it takes a LoRA without the middle block for one of SSD-1B")

    def is_read(layer: FileLayer) -> bool:
        if layer.end in ("_lora.down.weight", ".lora_linear_layer.down.weight"):
            return False
        if layer.place.part == "unet" or _is_kohya(layer):
            return True
        return layer.place.part == "text_encoder" and layer.name.startswith("text_encoder.") and _is_full(layer)

    return _count(lora, is_read), "; ".join(notes)


_TOOLS: dict[str, Callable[[ImportedLora], tuple[int, str]]] = {
    "ComfyUI": _comfyui,
    "AUTOMATIC1111": _a1111,
    "Forge": _forge,
    "InvokeAI": _invokeai,
    "SD.Next": _sdnext,
    "sd-scripts": _sd_scripts,
    "stable-diffusion.cpp": _sd_cpp,
    "Draw Things": _draw_things,
    "diffusers": diffusers_support,
}


def _count(lora: ImportedLora, is_read: Callable[[FileLayer], bool]) -> int:
    return sum(map(is_read, lora.layers))


def _is_kohya(layer: FileLayer) -> bool:
    """Whether readers of kohya's layout know the name, which ends as theirs and has text encoders' `text_model`."""
    return layer.name.startswith("lora_") and _has_kohya_end(layer) and (layer.place.part == "unet" or _is_full(layer))


def _has_kohya_end(layer: FileLayer) -> bool:
    return layer.end == ".lora_down.weight"


def _is_full(layer: FileLayer) -> bool:
    """Whether a text encoder's layer is called as in the files of all versions of transformers."""
    return "text_model" in layer.name


def _is_in_block(layer: FileLayer) -> bool:
    return layer.place.module.startswith(("down_blocks.", "mid_block.", "up_blocks."))


def _comfyui_knows(layer: FileLayer) -> bool:
    return _is_in_comfyui_map(layer.name, layer.place)


def _is_in_comfyui_map(name: str, place: Place) -> bool:
    """Its map has attention of the UNet as `processor.to_q` only, other layers also by their plain paths."""
    part, module, style = place
    if style == "comfyui" or name == "lora_te2_text_projection":
        return True
    if part != "unet":
        return "text_model" in name and (name.startswith("lora_") or name == f"{part}.{module}")
    if style in ("kohya-sgm", "kohya-diffusers", "lycoris"):
        return True
    return name.removeprefix("unet.") == module.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")


def _forge_knows(layer: FileLayer) -> bool:
    """As ComfyUI once did, before it knew some of these names."""
    return (
        _comfyui_knows(layer) and not layer.name.startswith("text_encoders.") and layer.end != ".lora_A.default.weight"
    )


def _forge_names(base: BaseNames) -> set[str]:
    """The names by which it finds changes of weights and biases: those of layers, and of the UNet's norms too."""
    places = dict(base.places)
    for module, layer in base.unet.named_modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            places |= names_of("unet", module, base.layers_per_block)
    return {name for name, place in places.items() if _is_in_comfyui_map(name, place)}


def _is_change_of(key: str, names: Collection[str]) -> bool:
    """Whether the key is the change of a weight or a bias, as ComfyUI and LyCORIS call them, of one of `names`."""
    name, _, end = key.rpartition(".")
    return end in ("diff", "diff_b", "w_norm", "b_norm") and name in names


def _invokeai_reads(ends: Collection[str]) -> bool:
    """Whether a layer's tensors are of a kind that it knows."""
    if "lora_up.weight" in ends:
        return "lora_down.weight" in ends
    return "diff" in ends or "w_norm" in ends


def _invokeai_sees_sdxl(layer: FileLayer) -> bool:
    """It looks for cross attention, a third block of a transformer, or a time projection in diffusers' names."""
    return re.search(r"_attn2_to_[kv]$|_time_emb_proj$|_transformer_blocks_([2-9]|1\d)_", layer.name) is not None


def _family_note(lora: ImportedLora) -> str:
    """A1111, Forge and SD.Next go by this entry; without it, or without any metadata, they guess."""
    version = lora.file.metadata.get("ss_base_model_version")
    if not lora.file.metadata or (version or "").startswith("sdxl_"):
        return ""
    says = "have no ss_base_model_version" if version is None else f"call its base {shown(version)}"
    return f"hidden while an SDXL model is loaded: the metadata {says}"
