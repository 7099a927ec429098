"""Reads the scale that PEFT and diffusers store apart from the factors: in the metadata, or in a file beside."""

from __future__ import annotations

import json
import logging
import math
import re
from typing import Any

from flatlora_diffusion.adapter.layers import PARTS
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.lora_files.safe_reading import CheckedFile, printable

logger = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."  # of the keys in a file saved by PEFT itself
_CONFIG_FILE = "adapter_config.json"


def adapter_settings(file: CheckedFile) -> dict[str, Any]:
    """Read the fields of the LoraConfig as `PART.FIELD`.

    They are in the metadata `lora_adapter_metadata`, or for a file saved by PEFT in `adapter_config.json` beside it;
    empty without either.

    Raises:
        ConfigError: The settings cannot be parsed, or PEFT saved a DoRA.
    """
    text = file.metadata.get("lora_adapter_metadata")
    if text is not None:
        return _parsed(text, f"{file.path}: its lora_adapter_metadata")
    if not any(PEFT_PREFIX in name for name in file.entries):
        return {}
    beside = file.path.with_name(_CONFIG_FILE)
    if not beside.is_file():
        logger.warning("%s was saved by PEFT, but there is no %s beside it: assuming scale 1", file.path, _CONFIG_FILE)
        return {}
    settings = _parsed(beside.read_bytes(), str(beside))
    if settings.get("use_dora"):
        raise ConfigError(f"{file.path} is a DoRA (use_dora in {_CONFIG_FILE}) and cannot be used; give a LoRA")
    return {f"{part}.{name}": value for part in PARTS for name, value in settings.items()}


def adapter_scale(settings: dict[str, Any], part: str, module: str, rank: int) -> float:
    """Compute alpha / rank, or alpha / sqrt(rank) with rsLoRA, as PEFT does; 1 without an alpha.

    `rank` is that of the layer's factors; `r` and `rank_pattern` only repeat it.
    """
    patterns = settings.get(f"{part}.alpha_pattern") or {}
    general = settings.get(f"{part}.lora_alpha")
    alphas = patterns.items() if isinstance(patterns, dict) else ()
    alpha = next((value for pattern, value in alphas if _matches(pattern, module)), general)
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or alpha == 0:
        raise ConfigError(
            f"lora_alpha of lora_adapter_metadata or {_CONFIG_FILE} must be a number, but is {printable(repr(alpha))}"
        )
    return alpha / (math.sqrt(rank) if settings.get(f"{part}.use_rslora") is True else rank)


def _parsed(text: str | bytes, source: str) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise ConfigError(f"{source} is not a JSON object")
    return settings


def _matches(pattern: str, module: str) -> bool:
    """Whether a pattern, a layer's path or the end of it, refers to this layer."""
    path = pattern.removeprefix("^").removesuffix("$").replace(r"\.", ".")
    if not re.fullmatch(r"[\w.]+", path):  # an untrusted regular expression may take forever
        raise ConfigError(f"alpha_pattern {printable(pattern)} is a regular expression; only layer names can be read")
    return f".{module}".endswith(f".{path}")
