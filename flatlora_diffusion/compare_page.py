"""A comparison as one HTML page: the verdict and the pictures first, then everything found; it works offline."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from flatlora_diffusion.page_charts import axis_row
from flatlora_diffusion.page_curves import groups, strengths, trajectories
from flatlora_diffusion.page_record import advice, made_with, nulls, proof, settings
from flatlora_diffusion.page_results import numbers, pair_row, pair_scale, pair_sides, paired
from flatlora_diffusion.page_style import SCRIPT, STYLE
from flatlora_diffusion.page_text import (
    MINUS,
    Result,
    Section,
    arm_name,
    chip,
    details,
    escaped,
    figure,
    headline,
    interval,
    main_arms,
    metric_of,
)

PAGE = "compare.html"
_SECTIONS = (numbers, paired, trajectories, strengths, groups, advice, nulls, proof, settings, made_with)
_LARGEST_PNG = 400_000  # bytes; larger ones go in as JPEG, or two dozen pictures of SDXL would make 45 MB
_PROMPTS_AT_ONCE = 8  # as many as stand side by side and are still worth looking at
_DIALOG = (
    '<dialog id="large"><div class="bar-of-buttons"><p></p><span>'
    '<button type="button" data-step="-1" aria-label="previous prompt">←</button> '
    '<button type="button" data-step="1" aria-label="next prompt">→</button> '
    '<button type="button" data-close="1">Close</button></span></div><div class="large"></div></dialog>'
)


def write_compare_page(result: Mapping[str, Any], folder: Path) -> Path:
    """Write `compare.html` into `folder`, which holds the pictures that `result` names; returns its path."""
    sections = [found for found in (build(result) for build in _SECTIONS) if found.body]
    arms = ", ".join(arm_name(result, arm) for arm in main_arms(result))
    body = _top(result, sections) + _pictures(result, folder) + "".join(found.html for found in sections)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped(f"Comparison: {arms}")}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main>{body}</main>{_DIALOG}<script>{SCRIPT}</script></body></html>"
    )
    path = folder / PAGE
    path.write_text(page, encoding="utf-8", newline="\n")
    return path


def _policy() -> str:
    """What the page may do: show what it holds and run its own script, nothing else."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"


def _top(result: Result, sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{found.anchor}">{escaped(found.title)}</a>' for found in sections)
    return (
        f'<div class="top"><p class="kicker">{_kicker(result)}</p>{_alarm(result)}'
        f'<h1 class="verdict">{escaped(result["verdict"])}</h1>{_headline(result)}'
        f'<nav aria-label="sections">{links}</nav></div>'
    )


def _kicker(result: Result) -> str:
    names = " · ".join(arm_name(result, arm) for arm in main_arms(result))
    parts = [f"<b>{escaped(names)}</b>"] if names else []
    seeds, steps = len(result["seeds"]), result["settings"].get("max_train_steps")
    if seeds:
        parts.append(f"{seeds} seed{'s' if seeds > 1 else ''}")
    if steps:
        parts.append(f"{escaped(steps)} steps")
    if result["device"]:
        parts.append(escaped(result["device"]))
    if result["proof"] and all(check["holds"] for check in result["proof"]):
        number = len(result["proof"])
        parts.append(f'<a class="ok" href="#proof">✓ {number} of {number} checks of equal conditions hold</a>')
    return "".join(f"<span>{part}</span>" for part in parts)


def _alarm(result: Result) -> str:
    failed = [
        f"{check['what']}: {check['note'] or 'does not hold'}" for check in result["proof"] if not check["holds"]
    ]
    if not failed:
        return ""
    return (
        '<p class="alarm" role="alert"><b>These runs are not a fair comparison.</b> '
        f'{escaped("; ".join(failed))}. <a href="#proof">See the proof</a></p>'
    )


def _headline(result: Result) -> str:
    """The chart of the verdict: one paired difference with its interval."""
    pair = headline(result)
    if pair is None:
        return ""
    metric, scale = metric_of(result, pair["metric"]), pair_scale([pair])
    names = f"{arm_name(result, pair['arm'])} {MINUS} {arm_name(result, pair['against'])}"
    found = (
        f"{figure(pair['mean'], metric['digits'], signed=True)} "
        f"{interval(pair['low'], pair['high'], metric['digits']) or 'of one seed, so without an interval'}"
    )
    caption = f"{escaped(metric['name'])}, {escaped(names)}: <b>{found}</b>"
    return (
        f'<figure class="headline"><figcaption>{caption}</figcaption>'
        f"{pair_row(result, pair, scale)}{axis_row(scale)}{pair_sides(result, pair)}</figure>"
    )


def _pictures(result: Result, folder: Path) -> str:
    """Grids of pictures: a row per model and a column per prompt; on narrow screens the other way round."""
    shown = result["pictures"]
    columns, files = shown.get("columns", []), shown.get("files", [])
    if not columns or not any(files):
        return ""
    keys = {arm_name(result, key): key for key in ("base", *(arm["key"] for arm in result["arms"]))}
    names = "".join(f"<span>{chip(result, keys[name]) if name in keys else escaped(name)}</span>" for name in columns)
    prompts = [
        _prompt(folder, prompt or "", list(zip(columns, row, strict=True)))
        for prompt, *row in zip_longest(shown["prompts"], *files)
    ]
    grids = [
        f'<div class="pictures" style="--columns: {len(columns)}; --prompts: {len(some)}">'
        f'<div class="names"><span></span>{names}</div>{"".join(some)}</div>'
        for some in (prompts[at : at + _PROMPTS_AT_ONCE] for at in range(0, len(prompts), _PROMPTS_AT_ONCE))
    ]
    more = details(f"{len(prompts) - _PROMPTS_AT_ONCE} more prompts", "".join(grids[1:])) if grids[1:] else ""
    note = "Each prompt has one seed for all models. Click a picture to see them large, side by side."
    return f'{grids[0]}<p class="note">{note}</p>{more}'


def _prompt(folder: Path, prompt: str, pictures: Sequence[tuple[str, str | None]]) -> str:
    shown = []
    for name, file in pictures:
        data = _embedded(folder, file)
        label = f'alt="{escaped(f"{name}: {prompt}")}" data-arm="{escaped(name)}"'
        shown.append(f'<img src="{data}" {label}>' if data else '<span class="gone">no picture</span>')
    return f'<div class="prompt"><p>{escaped(prompt)}</p>{"".join(shown)}</div>'


def _embedded(folder: Path, file: str | None) -> str:
    """The picture as a data URI; empty when it is not there, or not inside of `folder`."""
    path = (folder / (file or "")).resolve()
    if not path.is_file() or not path.is_relative_to(folder.resolve()):
        return ""
    if path.stat().st_size <= _LARGEST_PNG:
        return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    with Image.open(path) as image:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=92)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
