"""A LoRA file in any layout that is in use, made here or elsewhere, as factors by layer; hostile files are refused.

Only the base's layer names and shapes are needed, not its weights.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.adapter_settings import adapter_scale, adapter_settings
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_family import other_family
from flatlora_diffusion.lora_names import BaseNames, Place, Style, base_names, tiny_names
from flatlora_diffusion.lora_update import PARTS, Update, Updates
from flatlora_diffusion.safe_reading import CheckedFile, listed, shown

logger = logging.getLogger(__name__)

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
_MAGNITUDE = ".lora_magnitude_vector"
_DOWN = tuple(end for end, (side, _) in _FACTORS.items() if side == "down")
# Keys of adapters that are no LoRA.
_OTHER_KINDS = {
    "DoRA": r"\.dora_scale$|\.lora_magnitude_vector",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_w",
    "OFT or BOFT": r"\.b?oft_",
    "(IA)3": r"\.on_input$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with Tucker decomposition": r"\.lora_mid\.",
    "full weights": r"\.diff(_b)?$",
}
_NOT_PORTABLE = ": tools read it in at least four ways that do not agree, so it is not portable"
_OTHER_SIZES = "its layers have other sizes; give the base it was made for with --pretrained_model_name_or_path"


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
    """The LoRA of a file: fp32 factors with their scale, its layers in the file's order, and what no layer has.

    A DoRA has its magnitudes too, fp32 and in PEFT's shapes, by module path, by part.
    """

    file: CheckedFile
    base: BaseNames
    updates: Updates
    magnitudes: dict[str, dict[str, Tensor]]
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
    magnitude: str | None = None


def import_lora(file: CheckedFile, base: str | None = None) -> ImportedLora:
    """The LoRA of `file` for a base (a diffusers folder, `tiny`); None: SDXL, or `tiny` if its shapes are those.

    The scale is alpha / rank with the layer's alpha, or as the adapter's settings say, or 1. Raises ConfigError, one
    sentence, for another family of models, an adapter that is no LoRA, and shapes that do not fit.
    """
    names = base_names(base)
    _check_family(file, names)
    _check_kind(file, _OTHER_KINDS)
    return layers_of(file, _fitting(file, [names] if base is not None else [names, tiny_names()]))


def lora_of_base(file: CheckedFile, names: BaseNames) -> ImportedLora:
    """The LoRA of `file` for a base that is loaded, or its DoRA in PEFT's form, which PEFT is to apply.

    Warns of layers that are left out, since the base has none such. Raises ConfigError as `import_lora` does.
    """
    _check_family(file, names)
    _check_kind(file, _OTHER_KINDS | {"DoRA": r"\.dora_scale$"})
    misfits = _misfits(file, names)
    if misfits is None:
        raise ConfigError(f"{file.path} holds no layer of this base; is it a LoRA, and for SDXL?")
    if misfits:
        raise ConfigError(f"{file.path} cannot be read as a LoRA of this base: {_OTHER_SIZES}")
    lora = layers_of(file, names)
    if lora.magnitudes.keys() - {"unet"}:
        raise ConfigError(f"{file.path} holds DoRA of a text encoder, whose magnitudes diffusers does not restore")
    if lora.unknown:
        count = len(lora.layers)
        whole = count + sum(key.endswith(_DOWN) for key in lora.unknown)
        left = listed(lora.unknown)
        logger.warning("%s: only %d of its %d layers are in this base; left out: %s", file.path, count, whole, left)
    return lora


def layers_of(file: CheckedFile, names: BaseNames) -> ImportedLora:
    """The LoRA of a file that is known to fit the base of these names."""
    found = _found(file, names)
    settings = adapter_settings(file)
    updates: Updates = {}
    magnitudes: dict[str, dict[str, Tensor]] = {}
    layers = []
    for name, keys in found.layers.items():
        place = keys.place
        down, up = (_factor(file, keys, side, names) for side in ("down", "up"))
        alpha = None if keys.alpha is None else _alpha(file, keys.alpha)
        scale = _scale(settings, place, len(down)) if alpha is None else alpha / len(down)
        updates.setdefault(place.part, {})[place.module] = Update(down, up, scale)
        if keys.magnitude is not None:
            magnitudes.setdefault(place.part, {})[place.module] = _magnitude(file, keys.magnitude, up)
        layers.append(FileLayer(name, place, len(down), alpha, file.entries[keys.factors["down"]].dtype))
    ordered = {part: updates[part] for part in PARTS if part in updates}
    return ImportedLora(file, names, ordered, magnitudes, tuple(layers), tuple(found.unknown))


def _check_family(file: CheckedFile, names: BaseNames) -> None:
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    family = other_family(shapes, names.shapes["unet"][_any_cross_attention(names)][1])
    if family is not None:
        raise ConfigError(f"{file.path} is a LoRA for {family}, not for SDXL")


def _fitting(file: CheckedFile, candidates: Sequence[BaseNames]) -> BaseNames:
    """The base whose layers have the shapes of the file's. Raises ConfigError when there is none."""
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
        f"{file.path} has {len(wrong)} layer(s) of other shapes than those of {candidates[0].base}, such as "
        f"{listed(wrong, 1)}; it is for another base, which --base can name"
    )


def _any_cross_attention(names: BaseNames) -> str:
    return next(module for module in names.shapes["unet"] if module.endswith("attn2.to_k"))


def _check_kind(file: CheckedFile, refused: Mapping[str, str]) -> None:
    """Refuse kinds of adapters by the names of their tensors."""
    for kind, pattern in refused.items():
        key = next((key for key in file.entries if re.search(pattern, key)), None)
        if key is not None:
            why = _NOT_PORTABLE if kind == "DoRA" else ""
            raise ConfigError(f"{file.path} holds {kind}, not only LoRA ({shown(key)}), and cannot be used{why}")


def _found(file: CheckedFile, names: BaseNames) -> _Found:
    """The file's keys by layer, and those of no layer. Raises ConfigError for half a layer and for one given twice."""
    layers: dict[str, _Keys] = {}
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
            layers.setdefault(name, _Keys(place)).factors[side] = key
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
    return _Found(layers, unknown)


def _check_layers(file: CheckedFile, layers: dict[str, _Keys]) -> None:
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


def _magnitude(file: CheckedFile, key: str, up: Tensor) -> Tensor:
    """DoRA's magnitudes in the shape that PEFT gives them: (out,), and (1, out, 1, 1) for a convolution."""
    values = file.tensor(key).to(torch.float32)
    if values.numel() != len(up):
        raise ConfigError(
            f"{file.path}: {shown(key)} must be {len(up)} numbers, but has the shape {tuple(values.shape)}"
        )
    return values.reshape(-1) if up.ndim == 2 else values.reshape(1, -1, *up.shape[2:])


def _scale(settings: dict[str, Any], place: Place, rank: int) -> float:
    """The scale of a layer without an alpha; in kohya's layout it is 1 for all tools."""
    return 1.0 if place.style.startswith("kohya") else adapter_scale(settings, place.part, place.module, rank)
