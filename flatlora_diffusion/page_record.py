"""How a comparison came about, as sections of its page: advice, nulls, proof, settings, versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatlora_diffusion.page_text import (
    Result,
    Section,
    chip,
    details,
    escaped,
    figure,
    shown,
    table,
)

_SHORT = 12  # hex digits that tell hashes apart at a glance; the whole is in the title
_FEW = 3
_ROLES = {"arm": "compared", "null": "null"}


def advice(result: Result) -> Section:
    """Which checkpoint and strength of each run to use, and whether it had over-fitted by its end."""
    columns = ("arm", "seed", "checkpoint to use", "strength to use", "at the end", "why")
    rows = [
        [
            chip(result, found["arm"]),
            escaped(found["seed"]),
            "" if found["checkpoint"] is None else f"step {escaped(found['checkpoint'])}",
            figure(found["strength"], 2),
            '<span class="warn">over-fitted</span>'
            if found["over_fit"]
            else '<span class="ok">not over-fitted</span>',
            escaped(found["why"]),
        ]
        for found in result["advice"]
    ]
    text = "Chosen by held-out loss, so that a run that went on for too long can still be used."
    return Section("advice", "Over-fitting", text, table(columns, rows, "stack", long="why") if rows else "")


def nulls(result: Result) -> Section:
    """What differs although nothing but chance does, and what must not differ at all."""
    columns = ("run", "pictures differ by", "weights differ by", "says")
    rows = [
        [
            escaped(null["name"]),
            figure(null["picture_difference"], 4),
            figure(null["weight_difference"], 4),
            escaped(null["says"]),
        ]
        for null in result["nulls"]
    ]
    text = "Pairs of runs that must be equal, or that differ by chance alone. A difference of this size means nothing."
    return Section("nulls", "Nulls", text, table(columns, rows, "stack", long="says") if rows else "")


def proof(result: Result) -> Section:
    """The hashes of what the arms must share."""
    columns = ("what", "", "hashes of the runs")
    rows = [
        [
            f"{escaped(check['what'])} <small>{escaped(check['note'] or '')}</small>",
            '<span class="ok">✓ holds</span>' if check["holds"] else '<span class="bad">✗ fails</span>',
            _hashes(check["hashes"]),
        ]
        for check in result["proof"]
    ]
    text = "Hashes of what each run began from and saw. The runs beside one hash had it equal bit for bit."
    return Section("proof", "Proof", text, table(columns, rows, "stack", long=columns[-1]) if rows else "")


def settings(result: Result) -> Section:
    """In what the arms differ, and all that they share."""
    rows = [
        [
            chip(result, arm["key"]),
            escaped(_ROLES.get(arm["role"], arm["role"])),
            escaped(", ".join(f"{name} {shown(value)}" for name, value in arm["changes"].items())),
        ]
        for arm in result["arms"]
    ]
    body = table(("arm", "role", "changed settings"), rows, "stack", long="changed settings") if rows else ""
    if result["settings"]:
        body += details(f"All {len(result['settings'])} settings", _list(result["settings"]))
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    text = "All runs share one frozen set of settings, but for what their arm changes." + (
        f" Seeds: {escaped(seeds)}." if seeds else ""
    )
    return Section("settings", "Settings", text, body)


def made_with(result: Result) -> Section:
    """The device and the versions of the packages."""
    return Section("versions", "Made with", escaped(result["device"]), _list(result["versions"]))


def _hashes(hashes: Mapping[str, str]) -> str:
    """Each hash with the runs that have it."""
    runs: dict[str, list[str]] = {}
    for label, found in hashes.items():
        runs.setdefault(str(found), []).append(label)
    lines = "".join(
        f'<div><code title="{escaped(found)}">{escaped(found[:_SHORT])}</code> '
        f"<small>{escaped(' · '.join(labels))}</small></div>"
        for found, labels in runs.items()
    )
    return lines if len(runs) <= _FEW else details(f"{len(runs)} hashes of {len(hashes)} runs", lines)


def _list(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(shown(value))}</dd></div>" for name, value in values.items()
    )
    return f'<dl class="settings">{items}</dl>' if items else ""
