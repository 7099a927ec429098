"""How a comparison came about, prepared for its page: advice, nulls, proof, settings, versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatlora_diffusion.compare.page.format import Named, Result, Section, arm_name, chip, main_arms, shown
from flatlora_diffusion.storage.formatting import figure

_SHORT = 12  # hex digits that tell hashes apart at a glance; the whole is in the title
_FEW = 3
_ROLES = {"arm": "compared", "null": "control"}


def kicker(result: Result) -> Mapping[str, Any]:
    """The line above the verdict: what was compared, on what, and how many checks hold if all of them do."""
    seeds, steps = len(result["seeds"]), result["settings"].get("max_train_steps")
    facts = [
        f"{seeds} seed{'s' if seeds > 1 else ''}" if seeds else "",
        f"{steps} steps" if steps else "",
        result["device"],
    ]
    return {
        "arms": " · ".join(arm_name(result, arm) for arm in main_arms(result)),
        "facts": [fact for fact in facts if fact],
        "checks": len(result["proof"]) if all(check["holds"] for check in result["proof"]) else 0,
    }


def alarm(result: Result) -> str:
    """The checks of equal conditions that fail; empty when all hold."""
    failed = (f"{one['what']}: {one['note'] or 'does not hold'}" for one in result["proof"] if not one["holds"])
    return "; ".join(failed)


def advice(result: Result) -> Section:
    """The checkpoint and strength to use of each run, and whether it had over-fitted by its end."""
    rows = [
        {
            "arm": chip(result, one["arm"]),
            "seed": one["seed"],
            "checkpoint": "" if one["checkpoint"] is None else f"step {one['checkpoint']}",
            "strength": figure(one["strength"], 2),
            "over_fit": one["over_fit"],
            "why": one["why"],
        }
        for one in result["advice"]
    ]
    text = "Chosen by held-out loss, so that a run that went on for too long can still be used."
    return Section("advice", "Over-fitting", text, "advice", {"rows": rows} if rows else None)


def nulls(result: Result) -> Section:
    """The pairs of runs that differ by chance alone, and those that must not differ at all."""
    rows = [
        {
            "run": null["name"],
            "pictures": figure(null["picture_difference"], 4),
            "weights": figure(null["weight_difference"], 4),
            "says": null["says"],
        }
        for null in result["nulls"]
    ]
    text = "Pairs of runs that must be equal, or that differ by chance alone. A difference of this size means nothing."
    return Section("nulls", "Controls", text, "nulls", {"rows": rows} if rows else None)


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
    text = "Hashes of what each run began from and saw. The runs beside one hash had it equal bit for bit."
    return Section("proof", "Proof", text, "proof", {"rows": rows, "few": _FEW} if rows else None)


def settings(result: Result) -> Section:
    """In what the arms differ, and all that they share."""
    arms = [
        {
            "arm": chip(result, arm["key"]),
            "role": _ROLES.get(arm["role"], arm["role"]),
            "changes": ", ".join(f"{name} {shown(value)}" for name, value in arm["changes"].items()),
        }
        for arm in result["arms"]
    ]
    text = "All runs share one frozen set of settings, but for what their arm changes."
    if result["seeds"]:
        text += f" Seeds: {', '.join(str(seed) for seed in result['seeds'])}."
    content = {"arms": arms, "shared": _shown(result["settings"])} if arms or result["settings"] else None
    return Section("settings", "Settings", text, "settings", content)


def made_with(result: Result) -> Section:
    """The device and the versions of the packages."""
    content = {"versions": _shown(result["versions"])} if result["versions"] else None
    return Section("versions", "Made with", result["device"], "versions", content)


def _hashes(hashes: Mapping[str, str]) -> list[Mapping[str, str]]:
    """Each hash with the runs that have it."""
    runs: dict[str, list[str]] = {}
    for label, digits in hashes.items():
        runs.setdefault(str(digits), []).append(label)
    return [{"whole": digits, "short": digits[:_SHORT], "runs": " · ".join(labels)} for digits, labels in runs.items()]


def _shown(values: Mapping[str, Any]) -> list[Named]:
    return [Named(name, shown(value)) for name, value in values.items()]
