"""A LoRA file in any layout that is in use, made here or elsewhere, as factors by layer; hostile files are refused.

Only the base's layer names and shapes are needed, not its weights.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_family import other_family
from flatlora_diffusion.lora_names import BaseNames, Place, Style, base_names, tiny_names
from flatlora_diffusion.lora_update import PARTS, Update, Updates
from flatlora_diffusion.safe_reading import CheckedFile, listed, shown

# Ends of keys: which factor it is, and the style of the file.
_FACTORS: dict[str, tuple[str, Style]] = {
    ".lora_down.weight": ("down", "kohya-diffusers"),
    ".lora_up.weight": ("up", "kohya-diffusers"),
    ".lora_A.weight": ("down", "peft"),
    ".lora_B.weight": ("up", "peft"),
    ".lora_A.default.weight": ("down", "peft"),
    ".lora_B.default.weight": ("up", "peft"),
    ".lora.down.weight": ("down", "diffusers-old"),
    ".lora.up.weight": ("up", "diffusers-old"),
    ".lora_linear_layer.down.weight": ("down", "diffusers-old"),
    ".lora_linear_layer.up.weight": ("up", "diffusers-old"),
    "_lora.down.weight": ("down", "processor"),
    "_lora.up.weight": ("up", "processor"),
}
_ALPHA = ".alpha"
# Keys of adapters that are no LoRA.
_OTHER_KINDS = {
    "DoRA": r"\.dora_scale$|lora_magnitude_vector",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_w",
    "OFT or BOFT": r"\.b?oft_",
    "(IA)3": r"\.on_input$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with Tucker decomposition": r"\.lora_mid\.",
    "full weights": r"\.diff(_b)?$",
}
_NOT_PORTABLE = ": tools read it in at least four ways that do not agree, so it is not portable"


@dataclass(frozen=True)
class FileLayer:
    """A layer of a LoRA file: what it is called there, and its alpha; None when the file has none."""

    name: str
    place: Place
    rank: int
    alpha: float | None
    dtype: str


@dataclass(frozen=True)
class ImportedLora:
    """The LoRA of a file: fp32 factors with their scale, its layers in the file's order, and what no layer has."""

    file: CheckedFile
    base: BaseNames
    updates: Updates
    layers: tuple[FileLayer, ...]
    unknown: tuple[str, ...]


class _Found(NamedTuple):
    layers: dict[str, _Keys]
    unknown: list[str]


@dataclass
class _Keys:
    """The tensors of one layer by their names in the file."""

    place: Place
    factors: dict[str, str] = field(default_factory=dict)
    alpha: str | None = None


def import_lora(file: CheckedFile, base: str | None = None) -> ImportedLora:
    """The LoRA of `file` for a base (a diffusers folder, `tiny`); None: SDXL, or `tiny` if its shapes are those.

    The scale is alpha / rank with the layer's alpha, or as `lora_adapter_metadata` says, or 1. Raises ConfigError,
    one sentence, for another family of models, an adapter that is no LoRA, and shapes that do not fit.
    """
    return layers_of(file, _base_of(file, base))


def layers_of(file: CheckedFile, names: BaseNames) -> ImportedLora:
    """The LoRA of a file that is known to fit the base of these names."""
    found = _found(file, names)
    settings = _adapter_settings(file)
    updates: Updates = {}
    layers = []
    for name, keys in found.layers.items():
        place = keys.place
        down, up = (_factor(file, keys, side, names) for side in ("down", "up"))
        alpha = None if keys.alpha is None else _alpha(file, keys.alpha)
        scale = _peft_scale(settings, place, len(down)) if alpha is None else alpha / len(down)
        updates.setdefault(place.part, {})[place.module] = Update(down, up, scale)
        layers.append(FileLayer(name, place, len(down), alpha, file.entries[keys.factors["down"]].dtype))
    ordered = {part: updates[part] for part in PARTS if part in updates}
    return ImportedLora(file, names, ordered, tuple(layers), tuple(found.unknown))


def _base_of(file: CheckedFile, base: str | None) -> BaseNames:
    """The base whose layers have the shapes of the file's. Raises ConfigError when there is none."""
    names = base_names(base)
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    family = other_family(shapes, names.shapes["unet"][_any_cross_attention(names)][1])
    if family is not None:
        raise ConfigError(f"{file.path} is a LoRA for {family}, not for SDXL")
    _check_kind(file)
    candidates = [names] if base is not None else [names, tiny_names()]
    misfits = [_misfits(file, candidate) for candidate in candidates]
    if all(matched is None for matched in misfits):
        raise ConfigError(
            f"{file.path} holds no LoRA layer of SDXL's UNet or text encoders; its tensors are called "
            f"{listed(file.entries)}"
        )
    for candidate, wrong in zip(candidates, misfits, strict=True):
        if wrong == []:
            return candidate
    wrong = misfits[0] or []
    raise ConfigError(
        f"{file.path} has {len(wrong)} layer(s) of other shapes than those of {names.base}, such as {listed(wrong, 1)}"
        "; it is for another base, which --base can name"
    )


def _any_cross_attention(names: BaseNames) -> str:
    return next(module for module in names.shapes["unet"] if module.endswith("attn2.to_k"))


def _check_kind(file: CheckedFile) -> None:
    """Refuse adapters that are no LoRA, by their names."""
    for kind, pattern in _OTHER_KINDS.items():
        key = next((key for key in file.entries if re.search(pattern, key)), None)
        if key is not None:
            why = _NOT_PORTABLE if kind == "DoRA" else ""
            raise ConfigError(f"{file.path} holds {kind}, not only LoRA ({shown(key)}), and cannot be used{why}")


def _found(file: CheckedFile, names: BaseNames) -> _Found:
    """The file's keys by layer, and those of no layer. Raises ConfigError for half a layer and for one given twice."""
    layers: dict[str, _Keys] = {}
    unknown: list[str] = []
    alphas: list[str] = []
    for key in file.entries:
        end = next((end for end in _FACTORS if key.endswith(end)), None)
        place = None
        if end is not None:
            side, style = _FACTORS[end]
            name = key.removesuffix(end)
            place = names.place(name, style)
        if place is not None:
            layers.setdefault(name, _Keys(place)).factors[side] = key
        elif key.endswith(_ALPHA):
            alphas.append(key)
        else:
            unknown.append(key)
    for key in alphas:
        name = key.removesuffix(_ALPHA)
        if name in layers:
            layers[name].alpha = key
        else:
            unknown.append(key)
    _check_layers(file, layers)
    return _Found(layers, unknown)


def _check_layers(file: CheckedFile, layers: dict[str, _Keys]) -> None:
    places: dict[tuple[str, str], str] = {}
    for name, keys in layers.items():
        if keys.factors.keys() != {"down", "up"}:
            raise ConfigError(f"{file.path} is incomplete: of {shown(name)} it has only one of the two factors")
        place = keys.place.part, keys.place.module
        if place in places:
            raise ConfigError(f"{file.path} has one layer twice, as {shown(places[place])} and as {shown(name)}")
        places[place] = name


def _misfits(file: CheckedFile, names: BaseNames) -> list[str] | None:
    """The layers whose factors do not fit the base's weights; None when the file has no layer of this base."""
    found = _found(file, names).layers
    if not found:
        return None
    return [name for name, keys in found.items() if not _fits(file, keys, names)]


def _fits(file: CheckedFile, keys: _Keys, names: BaseNames) -> bool:
    down, up = (file.entries[keys.factors[side]].shape for side in ("down", "up"))
    out, *inner = names.shapes[keys.place.part][keys.place.module]
    if len(down) < 2 or len(up) < 2 or down[0] == 0:
        return False
    rank = down[0]
    is_flat = math.prod(up[2:]) == 1 and math.prod(down[2:]) == math.prod(inner[1:])
    return up[:2] == (out, rank) and down[1] == inner[0] and is_flat


def _factor(file: CheckedFile, keys: _Keys, side: str, names: BaseNames) -> Tensor:
    """A or B in fp32, in the shape that PEFT gives it: (r, in, kh, kw) and (out, r, 1, 1) for a convolution."""
    key = keys.factors[side]
    if not file.entries[key].dtype.startswith(("F", "BF")):
        raise ConfigError(f"{file.path}: {shown(key)} has dtype {file.entries[key].dtype}; weights must be floats")
    values = file.tensor(key).to(torch.float32)
    shape = names.shapes[keys.place.part][keys.place.module]
    if side == "down":
        return values.reshape(len(values), *shape[1:])
    return values.reshape(*values.shape[:2], *[1] * (len(shape) - 2))


def _alpha(file: CheckedFile, key: str) -> float:
    if math.prod(file.entries[key].shape) != 1:
        raise ConfigError(f"{file.path}: {shown(key)} must be one number, but has the shape {file.entries[key].shape}")
    alpha = float(file.tensor(key))
    if alpha == 0:
        raise ConfigError(f"{file.path}: {shown(key)} is 0, which tools read in different ways")
    return alpha


def _adapter_settings(file: CheckedFile) -> dict[str, Any]:
    """diffusers' `lora_adapter_metadata`, by `PART.FIELD`; empty when there is none."""
    text = file.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{file.path}: its lora_adapter_metadata is no JSON object")
    return settings


def _peft_scale(settings: dict[str, Any], place: Place, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rank-stabilized scale, as diffusers would read the settings; else 1."""
    if place.style.startswith("kohya"):
        return 1.0
    patterns = settings.get(f"{place.part}.alpha_pattern") or {}
    general = settings.get(f"{place.part}.lora_alpha")
    own = [value for name, value in patterns.items() if _is_meant(name, place)] if isinstance(patterns, dict) else []
    alpha = own[0] if own else general
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        raise ConfigError(f"the lora_alpha of lora_adapter_metadata must be a number, but is {shown(repr(alpha))}")
    return alpha / (math.sqrt(rank) if settings.get(f"{place.part}.use_rslora") is True else rank)


def _is_meant(pattern: str, place: Place) -> bool:
    """Whether a pattern, which is a layer's path or its end, means this layer."""
    path = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    return f".{place.module}".endswith(f".{path}")
