"""Assigns the keys of a LoRA file in any layout to the layers of a base; refuses half layers and other adapters.

Names and shapes decide; no tensor is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.names import BaseNames, Place, Style
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, shown

# Ends of keys: which factor it is, and the style of the file.
_FACTORS: dict[str, tuple[str, Style]] = {
    ".lora_down.weight": ("down", "diffusers-old"),  # for names that do not tell the style themselves
    ".lora_up.weight": ("up", "diffusers-old"),
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
_MAGNITUDE = ".lora_magnitude_vector"
DOWN_ENDS = tuple(end for end, (side, _) in _FACTORS.items() if side == "down")
# Keys of adapters that are no LoRA.
OTHER_KINDS = {
    "DoRA": r"\.dora_scale$|\.lora_magnitude_vector",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_w",
    "OFT or BOFT": r"\.b?oft_",
    "(IA)3": r"\.on_input$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with Tucker decomposition": r"\.lora_mid\.",
    "full weights": r"\.diff(_b)?$",
}
# Changes of weights and biases, as ComfyUI and LyCORIS save those of norms and biases beside the factors.
_CHANGE = re.compile(r"\.diff(_b)?$|\.[wb]_norm$")
_NOT_PORTABLE = ": tools read it in at least four ways that do not agree, so it is not portable"


class FoundKeys(NamedTuple):
    """The keys of a file: those of each layer, by the layer's name there, and those of none."""

    layers: dict[str, LayerKeys]
    unknown: list[str]


@dataclass
class LayerKeys:
    """The tensors of one layer by their names in the file."""

    place: Place
    factors: dict[str, str] = field(default_factory=dict)
    alpha: str | None = None
    magnitude: str | None = None


def found_keys(file: CheckedFile, names: BaseNames) -> FoundKeys:
    """The file's keys by layer, and those of no layer. Raises ConfigError for half a layer and for one given twice."""
    layers: dict[str, LayerKeys] = {}
    unknown: list[str] = []
    single: list[str] = []
    for key in file.entries:
        end = next((end for end in _FACTORS if key.endswith(end)), None)
        place = None
        if end is not None:
            side, style = _FACTORS[end]
            name = key.removesuffix(end)
            place = names.place(name, style)
        if place is not None:
            layers.setdefault(name, LayerKeys(place)).factors[side] = key
        elif key.endswith((_ALPHA, _MAGNITUDE)):
            single.append(key)
        else:
            unknown.append(key)
    for key in single:
        name, _, end = key.rpartition(".")
        if name not in layers:
            unknown.append(key)
        elif f".{end}" == _ALPHA:
            layers[name].alpha = key
        else:
            layers[name].magnitude = key
    _check_layers(file, layers)
    return FoundKeys(layers, unknown)


def misfits(file: CheckedFile, names: BaseNames) -> list[str] | None:
    """The layers whose factors do not fit the base's weights; None when the file has no layer of this base."""
    layers = found_keys(file, names).layers
    if not layers:
        return None
    return [name for name, keys in layers.items() if not _fits(file, keys, names)]


def check_kind(file: CheckedFile, refused: Mapping[str, str]) -> None:
    """Refuse kinds of adapters by the names of their tensors."""
    for kind, pattern in refused.items():
        key = next((key for key in file.entries if re.search(pattern, key) and not is_small_change(file, key)), None)
        if key is not None:
            why = _NOT_PORTABLE if kind == "DoRA" else ""
            raise ConfigError(f"{file.path} holds {kind}, not only LoRA ({shown(key)}), and cannot be used{why}")


def is_small_change(file: CheckedFile, key: str) -> bool:
    """Whether it is the change of a bias or a norm, which ComfyUI and LyCORIS save beside the factors."""
    return _CHANGE.search(key) is not None and len(file.entries[key].shape) < 2


def _check_layers(file: CheckedFile, layers: dict[str, LayerKeys]) -> None:
    places: dict[tuple[str, str], str] = {}
    is_dora = any(keys.magnitude is not None for keys in layers.values())
    for name, keys in layers.items():
        if keys.factors.keys() != {"down", "up"}:
            raise ConfigError(f"{file.path} is incomplete: of {shown(name)} it has only one of the two factors")
        if (keys.magnitude is None) == is_dora:
            raise ConfigError(
                f"{file.path} is incomplete: not all of its layers have a magnitude, such as {shown(name)}"
            )
        place = keys.place.part, keys.place.module
        if place in places:
            raise ConfigError(f"{file.path} has one layer twice, as {shown(places[place])} and as {shown(name)}")
        places[place] = name


def _fits(file: CheckedFile, keys: LayerKeys, names: BaseNames) -> bool:
    down, up = (file.entries[keys.factors[side]].shape for side in ("down", "up"))
    out, *inner = names.shapes[keys.place.part][keys.place.module]
    if len(down) < 2 or len(up) < 2 or down[0] == 0:
        return False
    rank = down[0]
    is_flat = math.prod(up[2:]) == 1 and math.prod(down[2:]) == math.prod(inner[1:])
    return up[:2] == (out, rank) and down[1] == inner[0] and is_flat
