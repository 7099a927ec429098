"""Formatting shared by all sections of a comparison's page: numbers, arms' names and looks, pictures, `Section`."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image

from flatlora_diffusion.charts.palette import BASE, FOURTH, OWN_LOOKS, THIRD, Look
from flatlora_diffusion.charts.rows import sample
from flatlora_diffusion.evaluation.paired_statistics import ENDS, STEPS
from flatlora_diffusion.storage.formatting import MINUS, MISSING, figure, is_known

Result = Mapping[str, Any]
Pair = Mapping[str, Any]

_MAX_PNG_BYTES = 400_000  # larger pictures are embedded as JPEG; two dozen of SDXL would take 45 MB as PNG
BETTER = {"lower": "lower is better", "higher": "higher is better"}


def mean_of(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    return statistics.fmean(values) if values else None


class Number(NamedTuple):
    """A number as text, with notes in small print."""

    text: str
    notes: tuple[str, ...] = ()


class Named(NamedTuple):
    """A name with a note in small print."""

    name: str
    note: str = ""


def mean_with_spread(values: Sequence[float], digits: int) -> Number:
    """Format the mean, with the standard deviation of two or more values."""
    notes = (f"± {figure(statistics.stdev(values), digits)}",) if len(values) > 1 else ()
    return Number(figure(mean_of(values), digits), notes)


def values_of(by_seed: Mapping[str, Any], metric: str) -> list[float]:
    """The known values of a metric over the seeds."""
    values = [figures.get(metric) for figures in by_seed.values()]
    return [value for value in values if is_known(value)]


def main_arms(result: Result) -> list[str]:
    """The keys of the compared arms, without controls."""
    return [arm["key"] for arm in result["arms"] if arm["role"] == "arm"]


def arm_name(result: Result, key: str) -> str:
    """The display name of an arm or of the base."""
    names = {arm["key"]: arm["name"] for arm in result["arms"]}
    return str(names.get(key, "Base" if key == "base" else key))


def look_of(result: Result, key: str) -> Look:
    """The line style of an arm; controls share one style."""
    if key == "base" or key in OWN_LOOKS:
        return OWN_LOOKS.get(key, BASE)
    others = [arm for arm in main_arms(result) if arm not in OWN_LOOKS]
    return THIRD if key in others[:1] else FOURTH


class Chip(NamedTuple):
    """An arm's name with a sample of its line and marker."""

    name: str
    mark: Markup


def chip(result: Result, key: str) -> Chip:
    """Build the chip of an arm or of the base."""
    return Chip(arm_name(result, key), _mark(look_of(result, key)))


@cache
def _mark(look: Look) -> Markup:
    return sample(look).svg("sample", "")


def setting_text(value: object) -> str:
    """Format a setting's value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return MISSING
    if isinstance(value, list | tuple):
        return ", ".join(setting_text(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def metric_of(result: Result, key: str) -> Mapping[str, Any]:
    """The description of a metric; a metric that only trajectories have is named by its key."""
    unnamed = {"key": key, "name": key.replace("_", " "), "better": None, "help": "", "digits": 4}
    return next((metric for metric in result["metrics"] if metric["key"] == key), unnamed)


def pairs_of(result: Result, metric: str) -> Iterator[Pair]:
    """The paired differences of a metric that have a mean."""
    return (pair for pair in result["paired"] if pair["metric"] == metric and is_known(pair["mean"]))


def headline(result: Result) -> Pair | None:
    """The pair of the verdict: two arms compared by the first metric at equal steps or at their ends."""
    arms = main_arms(result)
    for metric in result["metrics"]:
        for pair in pairs_of(result, metric["key"]):
            if pair["matched"] in (STEPS, ENDS) and pair["arm"] in arms and pair["against"] in arms:
                return pair
    return None


def difference_name(result: Result, pair: Pair) -> str:
    """The name of a pair's difference."""
    return f"{arm_name(result, pair['arm'])} {MINUS} {arm_name(result, pair['against'])}"


class Section(NamedTuple):
    """A section of the page, with `content` for the template of that name; omitted if the content is None."""

    anchor: str
    title: str
    text: str
    template: str
    content: Mapping[str, Any] | None


def data_uri(folder: Path, file: str | None) -> str:
    """The picture as a data URI; empty if it is missing or outside `folder`."""
    path = (folder / (file or "")).resolve()
    if not path.is_file() or not path.is_relative_to(folder.resolve()):
        return ""
    if path.stat().st_size <= _MAX_PNG_BYTES:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
