"""Settings and values of earlier versions: the sentence for those who give one, and how runs that have one open."""

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
        remedy: what to use in its place, the end of a sentence.
        without_effect: the value at which a removed setting did nothing.
        instead: the settings that a saved run is opened with in its place.
        is_renamed: whether `instead` does exactly the same.
    """

    remedy: str
    without_effect: Any = None
    instead: Mapping[str, Any] = field(default_factory=dict)
    is_renamed: bool = False


_NO_GAIN = "it showed no gain over"
SETTINGS: dict[str, Removed] = {
    "noise_share": Removed("use --method flat-lora"),
    "sigma_rise": Removed("give --sigma"),
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
    """The end of a sentence on a setting, or on a value of it, that an earlier version had; empty for all others."""
    removed = SETTINGS.get(name) or VALUES.get((name, value if isinstance(value, str) else ""))
    return "" if removed is None else f"; an earlier version had it: {removed.remedy}"


def without_removed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings as this version reads them; a warning names each removed setting that had an effect."""
    for text in removed_settings(values):
        _warn(text)
    return _replaced(values)


def removed_settings(values: Mapping[str, Any]) -> list[str]:
    """`name=value` for each of the saved settings that this version cannot repeat."""
    found = []
    for name, value in values.items():
        removed = SETTINGS.get(name)
        if removed is not None and value != removed.without_effect:
            found.append(f"{name}={value}")
        if isinstance(value, str) and (name, value) in VALUES and not VALUES[name, value].is_renamed:
            found.append(f"{name}={value}")
    return found


def _replaced(values: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in values.items() if name not in SETTINGS}
    for name, value in values.items():
        if isinstance(value, str) and (name, value) in VALUES:
            kept |= VALUES[name, value].instead
    return kept


@cache
def _warn(text: str) -> None:
    logger.warning("%s was removed from this version and is left out of the saved settings", text)
