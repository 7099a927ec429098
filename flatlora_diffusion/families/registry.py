"""The families by the class of their pipeline; the only file that names a family's package."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

from flatlora_diffusion.config import TINY_KLEIN, ConfigError, MixedPrecision, ModelConfig, function_at
from flatlora_diffusion.families.base_title import included_title, remedy, title_with_size
from flatlora_diffusion.families.family import Family
from flatlora_diffusion.families.paths import SETTING, base_file, read_settings

if TYPE_CHECKING:
    import torch

    from flatlora_diffusion.families.base import Base

_USUAL, _KLEIN = "StableDiffusionXLPipeline", "Flux2KleinPipeline"
# By `_class_name` in model_index.json. Imported on first use, and without torch: the app names bases with them.
FAMILIES = {
    _USUAL: "flatlora_diffusion.families.sdxl.family:SdxlFamily",
    _KLEIN: "flatlora_diffusion.families.klein.family:KleinFamily",
}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a base by its model_index.json, or by its hub id if that is not on disk.

    Other bases and single files are SDXL.
    """
    file = base_file(config, "model_index.json")
    if file is None:
        return _family_of_name(config.pretrained_model_name_or_path)
    try:
        kind = str(json.loads(file.read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, LookupError, TypeError):  # reported when the base is loaded
        kind = _USUAL
    return _family(FAMILIES.get(kind, FAMILIES[_USUAL]))


def families() -> list[Family]:
    """Return all families."""
    return [_family(path) for path in FAMILIES.values()]


def family_of_pipeline(pipeline: object) -> Family:
    """Return the family of a loaded pipeline; SDXL for a subclass or another class."""
    return _family(FAMILIES.get(type(pipeline).__name__, FAMILIES[_USUAL]))


def load_base(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Base:
    """Load the base onto `device`, frozen and in eval mode. Raises ConfigError if no family can load it."""
    check_kind(config)
    base: Base = function_at(family_of(config).loader)(config, device, dtype)
    return base


def check_kind(config: ModelConfig) -> None:
    """Raise ConfigError for a model_index.json that is invalid, or of a pipeline of no family."""
    file = base_file(config, "model_index.json")
    if file is None:
        return
    index, denoiser = read_settings(file), family_of(config).denoiser
    kind = str(index.get("_class_name", "pipeline of no class"))
    if kind not in FAMILIES and not index.get(denoiser):  # another pipeline of SDXL has a unet too
        names = " nor ".join(family.name for family in families())
        raise ConfigError(
            f"{SETTING}={config.pretrained_model_name_or_path!r} is a {kind} without {denoiser}, neither {names}; "
            "give a base of one of them"
        )


def random_base(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Base:
    """Create a base with random weights in the shapes of the base in `config`, without a download."""
    base: Base = function_at(family_of(config).random_loader)(config, device, dtype)
    return base


def drawing_precision(config: ModelConfig) -> MixedPrecision:
    """Return the default precision of images: fp16 on a GPU, bf16 for a family that prefers it, fp32 on a CPU."""
    import torch

    from flatlora_diffusion.families.device import has_bf16

    if not torch.cuda.is_available():
        return "no"
    return "bf16" if family_of(config).prefers_bf16 and has_bf16(torch.device("cuda")) else "fp16"


def base_title(model: ModelConfig) -> str:
    """Return `the tiny demo base, 64 pixels`, or another base's name or path with its native image size if known."""
    name = included_title(model) or model.pretrained_model_name_or_path
    sizes = family_of(model).known_sizes(model)
    return name if sizes is None else title_with_size(name, sizes.native)


def base_line(model: ModelConfig) -> str:
    """Return `base: ` and the title; for an included base also the flag that selects another."""
    return "; ".join(filter(None, (f"base: {base_title(model)}", remedy(model))))


def _family_of_name(name: str) -> Family:
    usual = _family(FAMILIES[_KLEIN if name == TINY_KLEIN else _USUAL])
    return next((family for family in families() if family.hub_name and family.hub_name in name.lower()), usual)


@lru_cache
def _family(path: str) -> Family:
    family: Family = function_at(path)()
    return family
