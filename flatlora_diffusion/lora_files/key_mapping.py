"""Maps the keys of a LoRA file in any layout to the layers of a base; rejects incomplete layers, other adapters and
other models.

Only names and shapes are looked at; no tensor is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.fused import split_fused
from flatlora_diffusion.lora_files.names import BaseNames, Style, Target
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, printable

# The factor and the style that the suffix of a key stands for.
_FACTORS: dict[str, tuple[str, Style]] = {
    ".lora_down.weight": ("down", "diffusers-old"),  # if the name itself does not determine the style
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
# Patterns of the keys of adapters other than LoRA.
OTHER_ADAPTERS = {
    "DoRA": r"\.dora_scale$|\.lora_magnitude_vector",
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_w",
    "OFT or BOFT": r"\.b?oft_",
    "(IA)3": r"\.on_input$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with Tucker decomposition": r"\.lora_mid\.",
    "full weights": r"\.diff(_b)?$",
}
# Differences of weights and biases, which ComfyUI and LyCORIS save for norms and biases.
_CHANGE = re.compile(r"\.diff(_b)?$|\.[wb]_norm$")
_NOT_PORTABLE = ": tools interpret it in at least four incompatible ways, so it is not portable"
_OTHER_TRANSFORMER = "a transformer model such as Wan, Qwen-Image or Z-Image"
_SD3 = "Stable Diffusion 3"
_TRANSFORMERS = ("Flux", _SD3, _OTHER_TRANSFORMER)
# Patterns of the keys of LoRA files for models other than SDXL.
_FAMILIES = (
    ("Flux", re.compile(r"(^|[._])(double_blocks|single_blocks|single_transformer_blocks)[._]")),
    (
        _SD3,
        re.compile(r"(^|[._])joint_blocks[._]|^lora_te3_|^text_encoder_3\.|[._]attn2?[._]add_[qkv]_proj"),
    ),
    (
        _OTHER_TRANSFORMER,
        re.compile(r"^(transformer|diffusion_model\.(layers|(transformer_)?blocks))\."),
    ),
    (
        "Stable Diffusion 1 or 2",  # SDXL has three blocks in each direction and two text encoders
        re.compile(r"^lora_te_|(^|[._])(down_blocks|up_blocks)[._]3[._]|(^|[._])(input|output)_blocks[._](9|1\d)[._]"),
    ),
)
_CROSS_ATTENTION = re.compile(r"attn2[._](processor[._])?to_[kv]")
_FAMILY_BY_TEXT_WIDTH = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the refiner of SDXL"}


class MappedKeys(NamedTuple):
    """The keys of a file by layer name, and the keys that belong to no layer."""

    layers: dict[str, LayerKeys]
    unknown: list[str]


@dataclass
class LayerKeys:
    """The keys of one layer's tensors."""

    target: Target
    factors: dict[str, str] = field(default_factory=dict)
    alpha: str | None = None
    magnitude: str | None = None


def with_split_layers(file: CheckedFile, names: BaseNames) -> CheckedFile:
    """Return the file with the layers that are several layers of this base split."""
    return split_fused(file, names.family.split_name, {end: side for end, (side, _) in _FACTORS.items()}, _ALPHA)


def map_keys(file: CheckedFile, names: BaseNames) -> MappedKeys:
    """Group the file's keys by layer. Raises ConfigError for an incomplete layer and for a duplicate."""
    layers: dict[str, LayerKeys] = {}
    unknown: list[str] = []
    single: list[str] = []
    for key in file.entries:
        end = next((end for end in _FACTORS if key.endswith(end)), None)
        target = None
        if end is not None:
            side, style = _FACTORS[end]
            name = key.removesuffix(end)
            target = names.target(name, style)
        if target is not None:
            layers.setdefault(name, LayerKeys(target)).factors[side] = key
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
    return MappedKeys(layers, unknown)


def shape_mismatches(file: CheckedFile, names: BaseNames) -> list[str] | None:
    """Names of the layers whose factors do not fit the base's weights; None if the file has no layer of this base."""
    file = with_split_layers(file, names)
    layers = map_keys(file, names).layers
    if not layers:
        return None
    return [name for name, keys in layers.items() if not _fits(file, keys, names)]


def reject_other_adapters(file: CheckedFile, refused: Mapping[str, str]) -> None:
    """Raise ConfigError if a key matches one of the adapter kinds in `refused`, which maps kinds to patterns."""
    for kind, pattern in refused.items():
        key = next((key for key in file.entries if re.search(pattern, key) and not is_bias_or_norm(file, key)), None)
        if key is not None:
            why = _NOT_PORTABLE if kind == "DoRA" else ""
            raise ConfigError(f"{file.path} contains {kind}, not only LoRA ({printable(key)}); it cannot be used{why}")


def is_bias_or_norm(file: CheckedFile, key: str) -> bool:
    """Whether `key` is the change of a bias or a norm, which ComfyUI and LyCORIS save beside the factors."""
    return _CHANGE.search(key) is not None and len(file.entries[key].shape) < 2


def is_for_transformer(file: CheckedFile) -> bool:
    """Whether the file has names of transformers such as FLUX.2 klein, and none of a UNet."""
    return other_family({name: entry.shape for name, entry in file.entries.items()}, 0) in _TRANSFORMERS


def other_family(shapes: Mapping[str, tuple[int, ...]], width: int) -> str | None:
    """Name the model that a file is for if it is not SDXL; None if it may be SDXL.

    Args:
        shapes: The shapes of the file's tensors by key.
        width: The width of the base's text embeddings, 2048 for SDXL.
    """
    for family, names in _FAMILIES:
        if any(names.search(name) for name in shapes):
            return family
    for name, shape in shapes.items():
        if len(shape) >= 2 and _CROSS_ATTENTION.search(name) and _is_down(name):
            family_by_width = None if shape[1] == width else _FAMILY_BY_TEXT_WIDTH.get(shape[1])
            if family_by_width is not None:
                return family_by_width
    return None


def _check_layers(file: CheckedFile, layers: dict[str, LayerKeys]) -> None:
    targets: dict[tuple[str, str], str] = {}
    is_dora = any(keys.magnitude is not None for keys in layers.values())
    for name, keys in layers.items():
        if keys.factors.keys() != {"down", "up"}:
            raise ConfigError(f"{file.path} is incomplete: it has only one of the two factors of {printable(name)}")
        if (keys.magnitude is None) == is_dora:
            raise ConfigError(
                f"{file.path} is incomplete: only some of its layers have a magnitude, see {printable(name)}"
            )
        target = keys.target.part, keys.target.module
        if target in targets:
            first, second = printable(targets[target]), printable(name)
            raise ConfigError(f"{file.path} contains a layer twice, as {first} and as {second}")
        targets[target] = name


def _fits(file: CheckedFile, keys: LayerKeys, names: BaseNames) -> bool:
    down, up = (file.entries[keys.factors[side]].shape for side in ("down", "up"))
    out, *inner = names.shapes[keys.target.part][keys.target.module]
    if len(down) < 2 or len(up) < 2 or down[0] == 0:
        return False
    rank = down[0]
    is_flat = math.prod(up[2:]) == 1 and math.prod(down[2:]) == math.prod(inner[1:])
    return up[:2] == (out, rank) and down[1] == inner[0] and is_flat


def _is_down(name: str) -> bool:
    return "lora_A" in name or "down.weight" in name
