"""Removed settings and values: their error messages, and their replacement in saved settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removed:
    """A removed setting or value.

    Attributes:
        remedy: the end of the error message: the setting to use instead.
        without_effect: the value that turned a removed setting off.
        instead: its replacement in saved settings.
        is_renamed: whether `instead` is equivalent.
    """

    remedy: str
    without_effect: Any = None
    instead: Mapping[str, Any] = field(default_factory=dict)
    is_renamed: bool = False


_NO_GAIN = "it showed no gain over"
SETTINGS: dict[str, Removed] = {
    "noise_share": Removed("use --method flat-lora"),
    "sigma_rise": Removed("give --sigma"),
    "holdout_folds": Removed("use --holdout_images", without_effect=0),
    "delta_weight_decay": Removed("use --adam_weight_decay", without_effect=0.0),
}
VALUES: dict[tuple[str, str], Removed] = {
    ("method", "mixed-noise"): Removed(f"{_NO_GAIN} --method flat-lora", instead={"method": "flat-lora"}),
    ("method", "factor-noise"): Removed(f"{_NO_GAIN} --method lora", instead={"method": "lora", "sigma": None}),
    ("method", "obar"): Removed(f"{_NO_GAIN} --method nbar", instead={"method": "nbar"}),
    ("adapter", "dora"): Removed("use --use_dora", instead={"adapter": "lora", "use_dora": True}, is_renamed=True),
    ("adapter", "rslora"): Removed(
        "use --use_rslora", instead={"adapter": "lora", "use_rslora": True}, is_renamed=True
    ),
    ("perturb_draw", "philox"): Removed("use --perturb_draw full", instead={"perturb_draw": "full"}),
    ("perturb_per", "example"): Removed(f"{_NO_GAIN} microbatch", instead={"perturb_per": "microbatch"}),
    ("sigma_schedule", "linear"): Removed(f"{_NO_GAIN} cosine", instead={"sigma_schedule": "cosine"}),
}


def why_removed(name: str, value: Any = None) -> str:
    """Return the end of the error message for a removed setting or value; empty for others."""
    removed = SETTINGS.get(name) or VALUES.get((name, value if isinstance(value, str) else ""))
    return "" if removed is None else f"; an earlier version had it: {removed.remedy}"


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return saved settings without removed ones; logs a warning for each that had an effect."""
    for text in removed_settings(values):
        _warn(text)
    return _replaced(values)


def removed_settings(values: Mapping[str, Any]) -> list[str]:
    """Return `name=value` of each saved setting that was removed without an equivalent."""
    texts = []
    for name, value in values.items():
        removed = SETTINGS.get(name)
        if removed is not None and value != removed.without_effect:
            texts.append(f"{name}={value}")
        if isinstance(value, str) and (name, value) in VALUES and not VALUES[name, value].is_renamed:
            texts.append(f"{name}={value}")
    return texts


def _replaced(values: Mapping[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in values.items() if name not in SETTINGS}
    for name, value in values.items():
        if isinstance(value, str) and (name, value) in VALUES:
            settings |= VALUES[name, value].instead
    return settings


@cache
def _warn(text: str) -> None:
    logger.warning("%s was removed from this version; the saved setting is ignored", text)
