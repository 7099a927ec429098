"""Predicts how much of a LoRA file each tool reads, by its loader's rules for key names; the rules here are for SDXL.

The rules come from running or reading those loaders; no tool is run here.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from torch import nn

from flatlora_diffusion.adapter.lora import TEXT_ATTENTION
from flatlora_diffusion.lora_files.names import BaseNames, Target
from flatlora_diffusion.lora_files.reading import FileLayer, ImportedLora
from flatlora_diffusion.lora_files.safe_reading import printable
from flatlora_diffusion.lora_files.scale import PEFT_PREFIX
from flatlora_diffusion.lora_tools.diffusers_support import diffusers_support
from flatlora_diffusion.lora_tools.klein_support import comfyui_layers, diffusers_layers

_MIXED_NAMES = "it rejects a mixture of SDXL's original and diffusers' block names"
_OUTSIDE_BLOCKS = ("conv_in", "conv_out", "time_embedding.", "add_embedding.")
_MAX_UNMATCHED = 12  # tensors; with more, Forge assumes another model
_INVOKEAI_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_")
_INVOKEAI_IGNORED = "bundle_emb"  # the embeddings of new tokens
_SDXL_BLOCKS = re.compile(r"lora_unet_((input|output)_blocks|middle_block|time_embed|label_emb|out)_\d")


Predict = Callable[[ImportedLora], tuple[int, str]]


class Support(NamedTuple):
    """The number of a file's layers that a tool applies, and a note for its user."""

    tool: str
    layers: int
    note: str = ""


def tool_support(lora: ImportedLora) -> list[Support]:
    """Predict the support of each tool, in a fixed order; empty for a family without rules."""
    labels = lora.base.labels
    tools = _TOOLS_BY_FAMILY.get(lora.base.family.pipeline, {})
    supports = [Support(tool, *predict(lora)) for tool, predict in tools.items()]
    if labels.is_demo:
        unsupported = f"only diffusers supports its base, {labels.name}"
        return [
            row._replace(note=row.note or "with the tiny base only")
            if row.tool == "diffusers"
            else Support(row.tool, 0, unsupported)
            for row in supports
        ]
    return [row if row.tool == "diffusers" else _with_strength(lora, row) for row in supports]


def _with_strength(lora: ImportedLora, row: Support) -> Support:
    """Note the factor by which a tool that reads no metadata gets the LoRA's strength wrong."""
    factors = sorted({1 / layer.scale for layer in lora.layers if layer.alpha is None and layer.scale != 1})
    if not factors or not row.layers:
        return row
    times = " to ".join(f"{factor:.3g}" for factor in dict.fromkeys((factors[0], factors[-1])))
    note = f"at {times} times its strength, because its alpha is not in a tensor; `export` adds it"
    return row._replace(note="; ".join(filter(None, (row.note, note))))


def _comfyui(lora: ImportedLora) -> tuple[int, str]:
    count = _count(lora, _comfyui_maps)
    return count, "" if count == len(lora.layers) else "it logs the other layers and ignores them"


def _forge(lora: ImportedLora) -> tuple[int, str]:
    known = [layer for layer in lora.layers if _forge_maps(layer)]
    others = [layer for layer in lora.layers if layer not in known]
    names = _forge_names(lora.base)
    unknown = [key for key in lora.unknown if not _is_change_of(key, names)]
    unmatched = len(unknown) + sum(2 + (layer.alpha is not None) for layer in others)
    if unmatched > _MAX_UNMATCHED:
        return 0, f"it rejects the file: {unmatched} tensors have unknown names"
    return len(known), _family_note(lora)


def _a1111(lora: ImportedLora) -> tuple[int, str]:
    groups = defaultdict(set)
    for layer in lora.layers:
        group, _, leaf = layer.target.module.rpartition(".")
        groups[layer.target.part, group].add(leaf)

    def is_read(layer: FileLayer) -> bool:
        part, module, style = layer.target
        group, _, leaf = module.rpartition(".")
        if part == "text_encoder_2" and leaf in TEXT_ATTENTION and not groups[part, group] >= set(TEXT_ATTENTION):
            return False  # A1111's second text encoder fuses q, k, v and out into one layer
        if style == "kohya-diffusers" and module.startswith(("add_embedding.", "up_blocks.0.upsamplers.")):
            return False
        return _is_kohya(layer)

    return _count(lora, is_read), _family_note(lora)


def _invokeai(lora: ImportedLora) -> tuple[int, str]:
    ends = defaultdict(set)
    for key in lora.file.entries:
        if not key.startswith(_INVOKEAI_IGNORED):
            name, _, end = key.partition(".")
            ends[name].add(end)
    if not all(name.startswith(_INVOKEAI_PREFIXES) for name in ends):
        return 0, "it rejects names without kohya's prefixes"
    if len({_SDXL_BLOCKS.match(name) is None for name in ends if name.startswith("lora_unet_")}) > 1:
        return 0, _MIXED_NAMES
    if not all(map(_invokeai_reads, ends.values())):
        return 0, "it rejects the file: it has tensors with unknown suffixes"
    if not any(_invokeai_sees_sdxl(layer) for layer in lora.layers):
        return 0, "it cannot recognize SDXL: the file has no cross-attention layer"
    return _count(lora, _is_kohya), ""


def _sdnext(lora: ImportedLora) -> tuple[int, str]:
    def is_read(
        layer: FileLayer,
    ) -> bool:  # for the first text encoder it knows the names of all transformers versions
        return _is_kohya(layer) or (layer.name.startswith("lora_te1_") and _has_kohya_suffix(layer))

    count = _count(lora, is_read)
    return count, _family_note(lora) if count else "only with its setting lora_force_diffusers"


def _sd_scripts(lora: ImportedLora) -> tuple[int, str]:
    styles = {layer.target.style for layer in lora.layers if _is_in_block(layer) and _is_kohya(layer)}
    if {"kohya-sgm", "kohya-diffusers"} <= styles:
        return 0, _MIXED_NAMES
    count = _count(lora, lambda layer: _is_kohya(layer) and not layer.target.module.startswith(_OUTSIDE_BLOCKS))
    return count, "" if count == len(lora.layers) else "it drops the other layers silently"


def _sd_cpp(lora: ImportedLora) -> tuple[int, str]:
    def is_read(layer: FileLayer) -> bool:
        if layer.target.part != "unet":
            return layer.name.startswith("lora_") and _has_text_model(layer)
        return not layer.target.module.startswith("add_embedding.") and PEFT_PREFIX not in layer.name

    has_rank_1 = any(layer.rank == 1 and layer.alpha is not None for layer in lora.layers)
    return _count(lora, is_read), "layers of rank 1 with an alpha get another scale" if has_rank_1 else ""


def _draw_things(lora: ImportedLora) -> tuple[int, str]:
    modules = [layer.target.module for layer in lora.layers if layer.target.part == "unet"]
    notes = []
    if not any(re.match(r"(down|up)_blocks\.1\.attentions\.0\..*attn2\.to_k$", module) for module in modules):
        notes.append("it may not recognize SDXL")
    if not any(module.startswith("mid_block.attentions.") for module in modules):
        notes.append("without the middle block it takes the LoRA for SSD-1B")

    def is_read(layer: FileLayer) -> bool:
        if layer.end in ("_lora.down.weight", ".lora_linear_layer.down.weight"):
            return False
        if layer.target.part == "unet" or _is_kohya(layer):
            return True
        return (
            layer.target.part == "text_encoder" and layer.name.startswith("text_encoder.") and _has_text_model(layer)
        )

    return _count(lora, is_read), "; ".join(notes)


_TOOLS: dict[str, Predict] = {
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
_TOOLS_BY_FAMILY: dict[str, Mapping[str, Predict]] = {  # by the class of the pipeline
    "StableDiffusionXLPipeline": _TOOLS,
    "Flux2KleinPipeline": {"ComfyUI": comfyui_layers, "diffusers": diffusers_layers},
}


def _count(lora: ImportedLora, is_read: Callable[[FileLayer], bool]) -> int:
    return sum(map(is_read, lora.layers))


def _is_kohya(layer: FileLayer) -> bool:
    """Whether readers of kohya's layout know the name: kohya's suffix, and `text_model` for text encoders."""
    return (
        layer.name.startswith("lora_")
        and _has_kohya_suffix(layer)
        and (layer.target.part == "unet" or _has_text_model(layer))
    )


def _has_kohya_suffix(layer: FileLayer) -> bool:
    return layer.end == ".lora_down.weight"


def _has_text_model(layer: FileLayer) -> bool:
    """Whether a text encoder's layer has the full path, as in files of older versions of transformers."""
    return "text_model" in layer.name


def _is_in_block(layer: FileLayer) -> bool:
    return layer.target.module.startswith(("down_blocks.", "mid_block.", "up_blocks."))


def _comfyui_maps(layer: FileLayer) -> bool:
    return _is_in_comfyui_map(layer.name, layer.target)


def _is_in_comfyui_map(name: str, target: Target) -> bool:
    """ComfyUI's map has the UNet's attention only as `processor.to_q`, other layers also by their module paths."""
    part, module, style = target
    if style == "comfyui" or name == "lora_te2_text_projection":
        return True
    if part != "unet":
        return "text_model" in name and (name.startswith("lora_") or name == f"{part}.{module}")
    if style in ("kohya-sgm", "kohya-diffusers", "lycoris"):
        return True
    return name.removeprefix("unet.") == module.replace(".to_", ".processor.to_").replace("to_out.0", "to_out")


def _forge_maps(layer: FileLayer) -> bool:
    """Forge uses an older version of ComfyUI's map, without some of these names."""
    return (
        _comfyui_maps(layer) and not layer.name.startswith("text_encoders.") and layer.end != ".lora_A.default.weight"
    )


def _forge_names(base: BaseNames) -> set[str]:
    """The names for which Forge accepts changes of weights and biases: layers, and the UNet's norms."""
    targets = dict(base.targets)
    for module, layer in base.denoiser.named_modules():
        if isinstance(layer, nn.GroupNorm | nn.LayerNorm):
            targets |= base.names_of(base.family.denoiser, module)
    return {name for name, target in targets.items() if _is_in_comfyui_map(name, target)}


def _is_change_of(key: str, names: Collection[str]) -> bool:
    """Whether `key` is the change of a weight or bias of one of `names`, in ComfyUI's or LyCORIS's spelling."""
    name, _, end = key.rpartition(".")
    return end in ("diff", "diff_b", "w_norm", "b_norm") and name in names


def _invokeai_reads(ends: Collection[str]) -> bool:
    """Whether InvokeAI knows a layer with these suffixes."""
    if "lora_up.weight" in ends:
        return "lora_down.weight" in ends
    return "diff" in ends or "w_norm" in ends


def _invokeai_sees_sdxl(layer: FileLayer) -> bool:
    """InvokeAI looks for cross attention, a third transformer block, or a time projection in diffusers' names."""
    return re.search(r"_attn2_to_[kv]$|_time_emb_proj$|_transformer_blocks_([2-9]|1\d)_", layer.name) is not None


def _family_note(lora: ImportedLora) -> str:
    """A1111, Forge and SD.Next hide the file unless this key names SDXL; without any metadata they guess."""
    version = lora.file.metadata.get("ss_base_model_version")
    if not lora.file.metadata or (version or "").startswith("sdxl_"):
        return ""
    reason = "have no ss_base_model_version" if version is None else f"call its base {printable(version)}"
    return f"hidden while an SDXL model is loaded: the metadata {reason}"
