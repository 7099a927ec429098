"""A LoRA file in any layout that is in use, made here or elsewhere, as factors by layer; hostile files are refused.

Only the base's layer names and shapes are needed, not its weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.adapter.delta import PARTS, LazyLayers, Update, Updates
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.families import other_family
from flatlora_diffusion.lora_files.key_mapping import (
    DOWN_ENDS,
    OTHER_KINDS,
    LayerKeys,
    check_kind,
    found_keys,
    misfits,
)
from flatlora_diffusion.lora_files.names import DIFFUSERS_STYLES, BaseNames, Place, base_names, tiny_names
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, listed, shown
from flatlora_diffusion.lora_files.scale import adapter_scale, adapter_settings

logger = logging.getLogger(__name__)

_OTHER_SIZES = "its layers have other sizes; give the base it was made for with --pretrained_model_name_or_path"


@dataclass(frozen=True)
class FileLayer:
    """A layer of a LoRA file: its name and the end of its first factor's key there, its alpha (None when the file has
    none) and the scale that it was made for.
    """

    name: str
    end: str
    place: Place
    rank: int
    alpha: float | None
    scale: float
    dtype: str


@dataclass(frozen=True)
class ImportedLora:
    """The LoRA of a file: fp32 factors with their scale, its layers in the file's order, and what no layer has.

    The factors are read from the file when they are asked for, and not kept.
    A DoRA has its magnitudes too, fp32 and in PEFT's shapes, by module path, by part.
    """

    file: CheckedFile
    base: BaseNames
    updates: Updates
    magnitudes: dict[str, dict[str, Tensor]]
    layers: tuple[FileLayer, ...]
    unknown: tuple[str, ...]


def import_lora(file: CheckedFile, base: str | None) -> ImportedLora:
    """The LoRA of `file` for a base (a diffusers folder, `tiny`); None: SDXL, or `tiny` if its shapes are those.

    The scale is alpha / rank with the layer's alpha, or as the adapter's settings say, or 1. Raises ConfigError, one
    sentence, for another family of models, an adapter that is no LoRA, and shapes that do not fit.
    """
    names = base_names(base)
    _check_family(file, names)
    check_kind(file, OTHER_KINDS)
    return layers_of(file, _fitting(file, [names] if base is not None else [names, tiny_names()]))


def lora_of_base(file: CheckedFile, names: BaseNames) -> ImportedLora:
    """The LoRA of `file` for a base that is loaded, or its DoRA in PEFT's form, which PEFT is to apply.

    Warns of layers that are left out, since the base has none such. Raises ConfigError as `import_lora` does.
    """
    _check_family(file, names)
    check_kind(file, OTHER_KINDS | {"DoRA": r"\.dora_scale$"})
    wrong = misfits(file, names)
    if wrong is None:
        raise ConfigError(f"{file.path} holds no layer of this base; is it a LoRA, and for SDXL?")
    if wrong:
        raise ConfigError(f"{file.path} cannot be read as a LoRA of this base: {_OTHER_SIZES}")
    lora = layers_of(file, names)
    if lora.magnitudes.keys() - {"unet"}:
        raise ConfigError(f"{file.path} holds DoRA of a text encoder, whose magnitudes diffusers does not restore")
    if lora.unknown:
        count = len(lora.layers)
        whole = count + sum(key.endswith(DOWN_ENDS) for key in lora.unknown)
        what = f"only {count} of its {whole} layers are in this base; left out" if whole > count else "left out"
        logger.warning("%s: %s: %s", file.path, what, listed(lora.unknown))
    return lora


def layers_of(file: CheckedFile, names: BaseNames) -> ImportedLora:
    """The LoRA of a file that is known to fit the base of these names."""
    keys_by_layer, unknown = found_keys(file, names)
    settings = adapter_settings(file)
    keys_of: dict[str, dict[str, tuple[LayerKeys, float]]] = {}
    magnitudes: dict[str, dict[str, Tensor]] = {}
    layers = []
    for name, keys in keys_by_layer.items():
        place = keys.place
        _check_factors(file, keys)
        key = keys.factors["down"]
        entry = file.entries[key]
        rank = entry.shape[0]
        alpha = None if keys.alpha is None else _alpha(file, keys.alpha)
        scale = _scale(settings, place, rank) if alpha is None else alpha / rank
        keys_of.setdefault(place.part, {})[place.module] = keys, scale
        if keys.magnitude is not None:
            shape = names.shapes[place.part][place.module]
            magnitudes.setdefault(place.part, {})[place.module] = _magnitude(file, keys.magnitude, shape)
        layers.append(FileLayer(name, key.removeprefix(name), place, rank, alpha, scale, entry.dtype))
    updates = {part: _lazily(file, keys_of[part], names) for part in PARTS if part in keys_of}
    return ImportedLora(file, names, updates, magnitudes, tuple(layers), tuple(unknown))


def _lazily(file: CheckedFile, keys_of: Mapping[str, tuple[LayerKeys, float]], names: BaseNames) -> LazyLayers:
    def read(module: str) -> Update:
        keys, scale = keys_of[module]
        return Update(_factor(file, keys, "down", names), _factor(file, keys, "up", names), scale)

    return LazyLayers(keys_of, read)


def _check_factors(file: CheckedFile, keys: LayerKeys) -> None:
    """Read both factors once, so that a file with a NaN in it is refused before anything is done with it."""
    for key in keys.factors.values():
        if not file.entries[key].dtype.startswith(("F", "BF")):
            raise ConfigError(f"{file.path}: {shown(key)} has dtype {file.entries[key].dtype}; weights must be floats")
        file.tensor(key)


def _check_family(file: CheckedFile, names: BaseNames) -> None:
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    family = other_family(shapes, names.shapes["unet"][_any_cross_attention(names)][1])
    if family is not None:
        raise ConfigError(f"{file.path} is a LoRA for {family}, not for SDXL")


def _fitting(file: CheckedFile, candidates: Sequence[BaseNames]) -> BaseNames:
    """The base whose layers have the shapes of the file's. Raises ConfigError when there is none."""
    misfitting = [misfits(file, candidate) for candidate in candidates]
    if all(wrong is None for wrong in misfitting):
        raise ConfigError(
            f"{file.path} holds no LoRA layer of SDXL's UNet or text encoders; its tensors are called "
            f"{listed(file.entries)}"
        )
    for candidate, wrong in zip(candidates, misfitting, strict=True):
        if wrong == []:
            return candidate
    wrong = misfitting[0] or []
    raise ConfigError(
        f"{file.path} has {len(wrong)} layer(s) of other shapes than those of {candidates[0].base}, such as "
        f"{listed(wrong, 1)}; it is for another base, which --base can name"
    )


def _any_cross_attention(names: BaseNames) -> str:
    return next(module for module in names.shapes["unet"] if module.endswith("attn2.to_k"))


def _factor(file: CheckedFile, keys: LayerKeys, side: str, names: BaseNames) -> Tensor:
    """A or B in fp32, in the shape that PEFT gives it: (r, in, kh, kw) and (out, r, 1, 1) for a convolution."""
    values = file.tensor(keys.factors[side]).to(torch.float32)
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


def _magnitude(file: CheckedFile, key: str, weight: Sequence[int]) -> Tensor:
    """DoRA's magnitudes for a weight of this shape as PEFT has them: (out,), and (1, out, 1, 1) for a convolution."""
    values = file.tensor(key).to(torch.float32)
    if values.numel() != weight[0]:
        raise ConfigError(
            f"{file.path}: {shown(key)} must be {weight[0]} numbers, but has the shape {tuple(values.shape)}"
        )
    return values.reshape(-1) if len(weight) == 2 else values.reshape(1, -1, *[1] * (len(weight) - 2))


def _scale(settings: dict[str, Any], place: Place, rank: int) -> float:
    """The scale of a layer without an alpha; but for the names of PEFT and diffusers it is 1 for all tools."""
    if place.style in DIFFUSERS_STYLES:
        return adapter_scale(settings, place.part, place.module, rank)
    return 1.0
