"""Reads LoRA files in any layout in use as low-rank factors by layer; rejects hostile files.

Only the base's layer names and shapes are needed, not its weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.adapter.delta import LazyLayers, Update, Updates
from flatlora_diffusion.adapter.layers import PARTS
from flatlora_diffusion.config import SDXL, TINY, TINY_KLEIN, ConfigError
from flatlora_diffusion.families.registry import families
from flatlora_diffusion.lora_files.key_mapping import (
    DOWN_ENDS,
    OTHER_ADAPTERS,
    LayerKeys,
    is_for_transformer,
    map_keys,
    other_family,
    reject_other_adapters,
    shape_mismatches,
    with_split_layers,
)
from flatlora_diffusion.lora_files.names import (
    DIFFUSERS_STYLES,
    BaseNames,
    Target,
    base_names,
    pipeline_names,
)
from flatlora_diffusion.lora_files.paths import lora_path
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, printable, read_header, shortlist
from flatlora_diffusion.lora_files.scale import adapter_scale, adapter_settings
from flatlora_diffusion.storage.model_paths import available_bases, check_lora

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileLayer:
    """A layer of a LoRA file.

    Attributes:
        name: The layer's name in the file.
        end: The suffix of the key of its A.
        alpha: The layer's alpha; None if the file has none.
        scale: The scale that the LoRA was trained with.
        dtype: The dtype of its A in safetensors' notation.
    """

    name: str
    end: str
    target: Target
    rank: int
    alpha: float | None
    scale: float
    dtype: str


@dataclass(frozen=True)
class ImportedLora:
    """The LoRA of a file.

    Attributes:
        updates: fp32 factors with their scale, read from the file on each access.
        magnitudes: DoRA's magnitudes in fp32 and PEFT's shapes, by part and module path.
        layers: The layers in the file's order.
        unknown: The keys that belong to no layer.
    """

    file: CheckedFile
    base: BaseNames
    updates: Updates
    magnitudes: dict[str, dict[str, Tensor]]
    layers: tuple[FileLayer, ...]
    unknown: tuple[str, ...]


def import_lora(file: CheckedFile, base: str | None) -> ImportedLora:
    """Read the LoRA of `file`, whatever its layout.

    The scale of a layer is alpha / rank with the layer's alpha, else from the adapter's settings, else 1.

    Args:
        base: A diffusers folder or `tiny`; None for an included base or the usual one of a family, whichever the
            file's names and shapes fit.

    Raises:
        ConfigError: The file is for another model family, no LoRA, or does not fit the base.
    """
    candidates = _candidates(file, base)
    _check_family(file, candidates[0], is_given=base is not None)
    reject_other_adapters(file, OTHER_ADAPTERS)
    return parse_layers(file, _fitting(file, candidates))


def load_for_base(file: CheckedFile, names: BaseNames) -> ImportedLora:
    """Read the LoRA of `file`, or a DoRA in PEFT's form, for a loaded base; warn about layers that the base lacks.

    Raises:
        ConfigError: As `import_lora`, and if no layer fits the base.
    """
    _check_family(file, names)
    reject_other_adapters(file, OTHER_ADAPTERS | {"DoRA": r"\.dora_scale$"})
    wrong = shape_mismatches(file, names)
    if wrong is None:
        raise ConfigError(f"{file.path} has no layer of this base; check that it is a LoRA for {names.family.name}")
    if wrong:
        raise ConfigError(
            f"{file.path} is not a LoRA of this base: its layers have other sizes; give the base it was made for with "
            "--pretrained_model_name_or_path"
        )
    lora = parse_layers(file, names)
    if lora.magnitudes.keys() - {names.family.denoiser}:
        raise ConfigError(f"{file.path} has DoRA magnitudes of a text encoder, which diffusers does not restore")
    if lora.unknown:
        count = len(lora.layers)
        whole = count + sum(key.endswith(DOWN_ENDS) for key in lora.unknown)
        note = f"only {count} of its {whole} layers are in this base; ignored" if whole > count else "ignored"
        logger.warning("%s: %s: %s", file.path, note, shortlist(lora.unknown))
    return lora


def load_init_lora(pipeline: Any, path: Path) -> ImportedLora:
    """Load the LoRA that a run starts from, a file or the run folder that holds it, for a pipeline without a LoRA.

    Raises ConfigError for a file that cannot be read or that adapts no layer of this base.
    """
    check_lora("init_lora", str(path))
    return load_for_base(read_header(lora_path(path)), pipeline_names(pipeline))


def parse_layers(file: CheckedFile, names: BaseNames) -> ImportedLora:
    """Read the LoRA of a file whose layers fit the base of these names."""
    file = with_split_layers(file, names)
    keys_by_layer, unknown = map_keys(file, names)
    settings = adapter_settings(file)
    keys_of: dict[str, dict[str, tuple[LayerKeys, float]]] = {}
    magnitudes: dict[str, dict[str, Tensor]] = {}
    layers = []
    for name, keys in keys_by_layer.items():
        target = keys.target
        _check_factors(file, keys)
        key = keys.factors["down"]
        entry = file.entries[key]
        rank = entry.shape[0]
        alpha = None if keys.alpha is None else _alpha(file, keys.alpha)
        scale = _scale(settings, target, rank) if alpha is None else alpha / rank
        keys_of.setdefault(target.part, {})[target.module] = keys, scale
        if keys.magnitude is not None:
            shape = names.shapes[target.part][target.module]
            magnitudes.setdefault(target.part, {})[target.module] = _magnitude(file, keys.magnitude, shape)
        layers.append(FileLayer(name, key.removeprefix(name), target, rank, alpha, scale, entry.dtype))
    updates = {part: _lazily(file, keys_of[part], names) for part in PARTS if part in keys_of}
    return ImportedLora(file, names, updates, magnitudes, tuple(layers), tuple(unknown))


def _lazily(file: CheckedFile, keys_of: Mapping[str, tuple[LayerKeys, float]], names: BaseNames) -> LazyLayers:
    def read(module: str) -> Update:
        keys, scale = keys_of[module]
        return Update(_factor(file, keys, "down", names), _factor(file, keys, "up", names), scale)

    return LazyLayers(keys_of, read)


def _check_factors(file: CheckedFile, keys: LayerKeys) -> None:
    """Read both factors once, so that a file with a NaN is rejected before use."""
    for key in keys.factors.values():
        if not file.entries[key].dtype.startswith(("F", "BF")):
            raise ConfigError(
                f"{file.path}: {printable(key)} has dtype {file.entries[key].dtype}; weights must be floats"
            )
        file.tensor(key)


def _check_family(file: CheckedFile, names: BaseNames, is_given: bool = True) -> None:
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    layers = names.shapes[names.family.denoiser].items()
    text_width = next((shape[1] for module, shape in layers if module.endswith("attn2.to_k")), None)
    if text_width is None:  # no UNet: names and shapes decide
        return
    family = other_family(shapes, text_width)
    if family is not None:
        is_maybe_klein = is_for_transformer(file) and not is_given
        remedy = "; if it is for a FLUX.2 klein of another size than 4B, give that with --base"
        raise ConfigError(f"{file.path} is a LoRA for {family}, not for SDXL{remedy if is_maybe_klein else ''}")


def _candidates(file: CheckedFile, base: str | None) -> list[BaseNames]:
    """The bases that the file may be for, without a `base` those that it may be for by its names."""
    if base is not None:
        return [base_names(base)]
    if is_for_transformer(file):
        usual = [family.usual_base for family in families() if family.denoiser == "transformer"]
        for name in (*usual, *(name for name in available_bases() if name == TINY_KLEIN)):
            names = base_names(name)
            # FLUX.1 has layers of klein's names and shapes, and others.
            whole = not any(key.endswith(DOWN_ENDS) for key in map_keys(with_split_layers(file, names), names).unknown)
            if whole and shape_mismatches(file, names) == []:
                return [names]
    return [base_names(SDXL), base_names(TINY)]


def _fitting(file: CheckedFile, candidates: Sequence[BaseNames]) -> BaseNames:
    """Pick the candidate whose layers have the file's shapes. Raises ConfigError if none has."""
    misfitting = [shape_mismatches(file, candidate) for candidate in candidates]
    if all(wrong is None for wrong in misfitting):
        raise ConfigError(
            f"{file.path} has no LoRA layer of {candidates[0].base}; its tensors are named {shortlist(file.entries)}"
        )
    for candidate, wrong in zip(candidates, misfitting, strict=True):
        if wrong == []:
            return candidate
    wrong = misfitting[0] or []
    raise ConfigError(
        f"{file.path} has {len(wrong)} layer(s) whose shapes do not fit {candidates[0].base}, such as "
        f"{shortlist(wrong, 1)}; give the base it was made for with --base"
    )


def _factor(file: CheckedFile, keys: LayerKeys, side: str, names: BaseNames) -> Tensor:
    """A or B in fp32 and PEFT's shape: for a convolution A is (r, in, kh, kw) and B is (out, r, 1, 1)."""
    values = file.tensor(keys.factors[side]).to(torch.float32)
    shape = names.shapes[keys.target.part][keys.target.module]
    if side == "down":
        return values.reshape(len(values), *shape[1:])
    return values.reshape(*values.shape[:2], *[1] * (len(shape) - 2))


def _alpha(file: CheckedFile, key: str) -> float:
    if math.prod(file.entries[key].shape) != 1:
        raise ConfigError(
            f"{file.path}: {printable(key)} must be one number, but has the shape {file.entries[key].shape}"
        )
    alpha = float(file.tensor(key))
    if alpha == 0:
        raise ConfigError(f"{file.path}: {printable(key)} is 0, which tools read in different ways")
    return alpha


def _magnitude(file: CheckedFile, key: str, weight: Sequence[int]) -> Tensor:
    """DoRA's magnitude in PEFT's shape for a weight of this shape: (out,), or (1, out, 1, 1) for a convolution."""
    values = file.tensor(key).to(torch.float32)
    if values.numel() != weight[0]:
        raise ConfigError(
            f"{file.path}: {printable(key)} must be {weight[0]} numbers, but has the shape {tuple(values.shape)}"
        )
    return values.reshape(-1) if len(weight) == 2 else values.reshape(1, -1, *[1] * (len(weight) - 2))


def _scale(settings: dict[str, Any], target: Target, rank: int) -> float:
    """The scale of a layer without an alpha: from the adapter's settings in PEFT's and diffusers' layouts, else 1."""
    if target.style in DIFFUSERS_STYLES:
        return adapter_scale(settings, target.part, target.module, rank)
    return 1.0
