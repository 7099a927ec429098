"""How a comparison came about, prepared for its page: advice, nulls, proof, settings, versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flatlora_diffusion.compare.page.text import Named, Result, Section, arm_name, chip, main_arms, shown
from flatlora_diffusion.ground.numbers import figure

_SHORT = 12  # hex digits that tell hashes apart at a glance; the whole is in the title
_FEW = 3
_ROLES = {"arm": "compared", "null": "null"}


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
    """Which checkpoint and strength of each run to use, and whether it had over-fitted by its end."""
    rows = [
        {
            "arm": chip(result, found["arm"]),
            "seed": found["seed"],
            "checkpoint": "" if found["checkpoint"] is None else f"step {found['checkpoint']}",
            "strength": figure(found["strength"], 2),
            "over_fit": found["over_fit"],
            "why": found["why"],
        }
        for found in result["advice"]
    ]
    text = "Chosen by held-out loss, so that a run that went on for too long can still be used."
    return Section("advice", "Over-fitting", text, "advice", {"rows": rows} if rows else None)


def nulls(result: Result) -> Section:
    """What differs although nothing but chance does, and what must not differ at all."""
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
    return Section("nulls", "Nulls", text, "nulls", {"rows": rows} if rows else None)


def proof(result: Result) -> Section:
    """The hashes of what the arms must share."""
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
    found = {"arms": arms, "shared": _shown(result["settings"])} if arms or result["settings"] else None
    return Section("settings", "Settings", text, "settings", found)


def made_with(result: Result) -> Section:
    """The device and the versions of the packages."""
    found = {"versions": _shown(result["versions"])} if result["versions"] else None
    return Section("versions", "Made with", result["device"], "versions", found)


def _hashes(hashes: Mapping[str, str]) -> list[Mapping[str, str]]:
    """Each hash with the runs that have it."""
    runs: dict[str, list[str]] = {}
    for label, found in hashes.items():
        runs.setdefault(str(found), []).append(label)
    return [{"whole": found, "short": found[:_SHORT], "runs": " · ".join(labels)} for found, labels in runs.items()]


def _shown(found: Mapping[str, Any]) -> list[Named]:
    return [Named(name, shown(value)) for name, value in found.items()]
