"""Checks an evidence.json that somebody posted, and writes its row for the table of reports."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.versions import PROGRAM

SCHEMA = 1
"""Of evidence.json; it rises when a key of the file changes its meaning."""
MAX_BYTES = 1_000_000
COLUMNS = (
    *("device", "version", "trained", "Flat-LoRA less LoRA", "average of 3 less LoRA", "seconds per step"),
    "peak memory",
)
KEYS = (
    *("schema", "program", "version", "system", "device", "device_memory", "cuda", "versions", "settings", "images"),
    *("seeds", "verdict", "metrics", "base", "values", "paired", "trajectories", "nulls", "is_alike", "runs"),
)
# An absolute path of Linux, a Mac or Windows, or one below a home folder, at the start of a word.
_PATH = re.compile(r"(?:^|[\s\"'=(:,])(?:~?/[\w.-]|[A-Za-z]:[\\/]|\\\\)")
_FLAT, _AVERAGE, _BASELINE = "flat-lora", "lora:members=3", "lora"
_DIGITS = 5  # of a loss


def read_evidence(file: Path) -> dict[str, Any]:
    """Read and check an evidence.json.

    Returns:
        Its content, with all of `KEYS`.

    Raises:
        ConfigError: The file is too large, cut, of another program or schema, or has a number that is not finite or an
            absolute path.
    """
    if not file.is_file():
        raise ConfigError(
            f"check={str(file)!r} is not a file; give the evidence.json of a finished `flatlora evidence`"
        )
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(f"{file.name} has {size} bytes; an evidence.json has at most {MAX_BYTES}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file.name} is damaged or cut; ask for the whole file: {error}") from error
    if not isinstance(content, dict) or content.get("program") != PROGRAM:
        raise ConfigError(f"{file.name} is not of `flatlora evidence`: its program must be {PROGRAM!r}")
    if content.get("schema") != SCHEMA:
        raise ConfigError(
            f"{file.name} has schema {content.get('schema')!r}, but this version reads {SCHEMA}; check it with "
            f"{PROGRAM} {content.get('version')}"
        )
    missing = [key for key in KEYS if key not in content]
    if missing:
        raise ConfigError(f"{file.name} lacks {', '.join(missing)}; run `flatlora evidence` again to write it anew")
    for place, text in _texts(content, ""):
        if _PATH.search(text):
            raise ConfigError(
                f"{file.name} has a path in {place.lstrip('.')}: {text[:80]!r}; remove it before posting"
            )
    return content


def report_row(content: dict[str, Any]) -> str:
    """Write the row of a checked evidence.json in the table of reports, with the columns `COLUMNS`.

    Raises:
        ConfigError: A value below `KEYS` is missing or of another type.
    """
    try:
        cells = _cells(content)
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ConfigError(
            f"the file has schema {SCHEMA} but not its values ({type(error).__name__}: {first_line(error)}); ask for "
            "the file as `flatlora evidence` wrote it"
        ) from error
    # Somebody else's texts: a cell of Markdown, without line breaks and HTML.
    texts = (html.escape(" ".join(cell.split()).replace("|", "/"), quote=False) for cell in cells)
    return f"| {' | '.join(texts)} |"


def _cells(content: dict[str, Any]) -> list[str]:
    settings, runs = content["settings"], content["runs"]
    seeds, steps = len(content["seeds"]), settings["max_train_steps"]
    trained = f"{steps} steps, {seeds} seed{'s' if seeds > 1 else ''}, {settings['mixed_precision'] or 'fp32'}"
    baseline = [values["seconds_per_step"] for values in content["values"].get(_BASELINE, {}).values()]
    peak = max((run["memory"] for run in runs if run["memory"]), default=0)
    return [
        str(content["device"]),
        str(content["version"]),
        trained,
        _difference(content, _FLAT),
        _difference(content, _AVERAGE),
        f"{sum(baseline) / len(baseline):.2f}" if baseline else "",
        f"{peak / 2**30:.1f} GiB",
    ]


def _difference(content: dict[str, Any], arm: str) -> str:
    """The difference in held-out loss at equal steps, with half of its 95 % interval; empty without it."""
    for row in content["paired"]:
        wanted = (arm, _BASELINE, "heldout_loss", "steps")
        if (row["arm"], row["against"], row["metric"], row["matched"]) == wanted:
            half = "" if row["low"] is None else f" ± {(row['high'] - row['low']) / 2:.{_DIGITS}f}"
            return f"{row['mean']:+.{_DIGITS}f}{half}"
    return ""


def _finite(text: str) -> float:
    """Read a number of JSON, or one of the words NaN and Infinity, which Python's JSON may have."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it has the number {text}")
    return number


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield all texts below `value` with their place, keys included."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield place, key
            yield from _texts(item, f"{place}.{key}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{place}[{number}]")
