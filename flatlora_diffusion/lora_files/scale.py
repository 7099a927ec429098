"""The scale that PEFT and diffusers keep apart from the factors: in a file's metadata, or in a file beside it."""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

from flatlora_diffusion.adapter.delta import PARTS
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, shown

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."  # of the names in a file that PEFT itself has saved
_CONFIG_FILE = "adapter_config.json"


def adapter_settings(file: CheckedFile) -> dict[str, Any]:
    """The fields of the LoraConfig by `PART.FIELD`: from the metadata `lora_adapter_metadata`, or for a file with
    PEFT's own names from the `adapter_config.json` beside it; empty when there is neither.

    Raises ConfigError for settings that are none, and for a DoRA of PEFT's.
    """
    text = file.metadata.get("lora_adapter_metadata")
    if text is not None:
        return _parsed(text, f"{file.path}: its lora_adapter_metadata")
    if not any(PEFT_PREFIX in name for name in file.entries):
        return {}
    beside = file.path.with_name(_CONFIG_FILE)
    if not beside.is_file():
        logger.warning("%s was saved by PEFT, but no %s is beside it: scale 1 is assumed", file.path, _CONFIG_FILE)
        return {}
    settings = _parsed(beside.read_bytes(), str(beside))
    if settings.get("use_dora"):
        raise ConfigError(f"{file.path} is a DoRA, as {_CONFIG_FILE} says (use_dora), and cannot be used")
    return {f"{part}.{name}": value for part in PARTS for name, value in settings.items()}


def adapter_scale(settings: dict[str, Any], part: str, module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rank-stabilized scale, as PEFT would read the settings; else 1.

    The rank is that of the layer's factors, which `r` and `rank_pattern` only repeat.
    """
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    general = settings.get(f"{part}.lora_alpha")
    own = [value for name, value in patterns.items() if _is_meant(name, module)] if isinstance(patterns, dict) else []
    alpha = own[0] if own else general
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        raise ConfigError(
            f"the lora_alpha of lora_adapter_metadata or {_CONFIG_FILE} must be a number, but is {shown(repr(alpha))}"
        )
    return alpha / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") is True else rank)


def _parsed(text: str | bytes, what: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{what} is no JSON object")
    return settings


def _is_meant(pattern: str, module: str) -> bool:
    """Whether a pattern, which is a layer's path or its end, means this layer."""
    path = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    if not re.fullmatch(r"[\w.]+", path):  # a file from elsewhere may hold one that takes forever
        raise ConfigError(f"the alpha_pattern {shown(pattern)} is a regular expression, and only names can be read")
    return f".{module}".endswith(f".{path}")
