"""Prepares a comparison's advice, controls, proof, settings and versions for its page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatlora_diffusion.compare.page.format import (
    Named,
    Result,
    Section,
    arm_name,
    chip,
    main_arms,
    setting_text,
)
from flatlora_diffusion.storage.formatting import count_text, figure

_SHORT_HASH = 12  # hex digits; the tooltip has the full hash
_MAX_OPEN_HASHES = 3  # more hashes of a condition are folded
_ROLES = {"arm": "compared", "null": "control"}


def subtitle(result: Result) -> Mapping[str, Any]:
    """The line above the verdict: arms, seeds, steps, device, and the number of checks if all of them hold."""
    seeds, steps = len(result["seeds"]), result["settings"].get("max_train_steps")
    facts = [
        count_text(seeds, "seed") if seeds else "",
        f"{steps} steps" if steps else "",
        result["device"],
    ]
    return {
        "arms": " · ".join(arm_name(result, arm) for arm in main_arms(result)),
        "facts": [fact for fact in facts if fact],
        "checks": len(result["proof"]) if all(check["holds"] for check in result["proof"]) else 0,
    }


def warning(result: Result) -> str:
    """The failed checks of equal conditions; empty if all hold."""
    failed = (check for check in result["proof"] if not check["holds"])
    return "; ".join(f"{check['what']}: {check['note'] or 'differs between runs'}" for check in failed)


def advice(result: Result) -> Section:
    """The recommended checkpoint and strength of each run, and whether the run over-fitted."""
    rows = [
        {
            "arm": chip(result, row["arm"]),
            "seed": row["seed"],
            "checkpoint": "" if row["checkpoint"] is None else f"step {row['checkpoint']}",
            "strength": figure(row["strength"], 2),
            "over_fit": row["over_fit"],
            "why": row["why"],
        }
        for row in result["advice"]
    ]
    text = "The checkpoint and strength with the lowest held-out loss. An over-fitted run has a better checkpoint."
    return Section("advice", "Over-fitting", text, "advice", {"rows": rows} if rows else None)


def controls(result: Result) -> Section:
    """The pairs of runs that must be equal, or that differ by chance alone."""
    rows = [
        {
            "run": row["name"],
            "pictures": figure(row["picture_difference"], 4),
            "weights": figure(row["weight_difference"], 4),
            "says": row["says"],
        }
        for row in result["nulls"]
    ]
    text = (
        "Pairs of runs that must be equal, or that differ by chance alone. A difference of this size between arms is "
        "not meaningful."
    )
    return Section("controls", "Controls", text, "controls", {"rows": rows} if rows else None)


def proof(result: Result) -> Section:
    """The hashes of the conditions that the runs should share."""
    rows = [
        {
            "what": Named(check["what"], check["note"] or ""),
            "holds": check["holds"],
            "hashes": _hashes(check["hashes"]),
            "runs": len(check["hashes"]),
        }
        for check in result["proof"]
    ]
    text = (
        "Hashes of the images, base, initial weights and draws of each run. Runs with one hash were equal bit for bit."
    )
    return Section("proof", "Proof", text, "proof", {"rows": rows, "max_open": _MAX_OPEN_HASHES} if rows else None)


def settings(result: Result) -> Section:
    """The settings that each arm changes, and the shared settings."""
    arms = [
        {
            "arm": chip(result, arm["key"]),
            "role": _ROLES.get(arm["role"], arm["role"]),
            "changes": ", ".join(f"{name} {setting_text(value)}" for name, value in arm["changes"].items()),
        }
        for arm in result["arms"]
    ]
    text = "All runs share the same settings except those that their arm changes."
    if result["seeds"]:
        text += f" Seeds: {', '.join(str(seed) for seed in result['seeds'])}."
    content = {"arms": arms, "shared": _setting_rows(result["settings"])} if arms or result["settings"] else None
    return Section("settings", "Settings", text, "settings", content)


def versions(result: Result) -> Section:
    """The device and the package versions."""
    content = {"versions": _setting_rows(result["versions"])} if result["versions"] else None
    return Section("versions", "Versions", result["device"], "versions", content)


def _hashes(hashes: Mapping[str, str]) -> list[Mapping[str, str]]:
    runs: dict[str, list[str]] = {}
    for label, digits in hashes.items():
        runs.setdefault(str(digits), []).append(label)
    return [
        {"full": digits, "short": digits[:_SHORT_HASH], "runs": " · ".join(labels)} for digits, labels in runs.items()
    ]


def _setting_rows(values: Mapping[str, Any]) -> list[Named]:
    return [Named(name, setting_text(value)) for name, value in values.items()]
