"""The answer that the page of `paper_variants` begins with: sentences made by rule of corrected intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paper_flatness import table
from benchmarks.paper_variants_figures import HEADLINES, METRICS, Result, headline_rows
from benchmarks.paper_words import UNIT, interval, is_told
from flatlora_diffusion.compare.arms import parse_arm
from flatlora_diffusion.compare.paired import CONFIDENCE


def answer(results: Mapping[str, Result]) -> str:
    """Whether Flat-LoRA beats LoRA when both are tuned; where it does best as given; what of that others have too."""
    found = {(row["part"], row["name"], row["metric"]): row for row in headline_rows(results)}
    said = (_tuned(results, found), _best_cell(results, found), _own_part(results, found), *_how_sure(found))
    return " ".join(said)


def in_short(results: Mapping[str, Result]) -> str:
    """Both tuned, or, as long as that was not measured, the best sigma and schedule; and what SAM does."""
    found = {(row["part"], row["name"], row["metric"]): row for row in headline_rows(results)}
    flat = _tuned(results, found) if "tuned" in results else _best_cell(results, found)
    sam = found.get(("sam", "SAM", "report"))
    by_sam = () if sam is None else (f"SAM over W less LoRA, with seeds of its own: {_said(sam)} at the end.",)
    return " ".join((flat, *by_sam, *_how_sure(found)))


def verdict(found: Mapping[str, Any]) -> str:
    """What a difference of losses says."""
    if found["low"] is None:
        return "one seed cannot tell" if len(found["differences"]) == 1 else "seeds that are alike cannot tell"
    if not is_told(found):
        return "no difference found"
    return "better" if found["high"] < 0 else "worse"


def headline_table(results: Mapping[str, Result]) -> str:
    """The headline comparisons with corrected intervals; those not run are counted too."""
    found = headline_rows(results)
    rows = [
        [
            _name(row["arm"]),
            _name(row["against"]),
            METRICS[row["metric"]],
            f"{row['n']}",
            interval(row, 1),
            verdict(row),
        ]
        for row in found
    ]
    level = 100 * (1 - (1 - CONFIDENCE) / len(HEADLINES))
    return (
        f"## Headline comparisons\n\n{len(found)} of {len(HEADLINES)} were run. Their intervals hold together with "
        f"95 % (Bonferroni: each is one of {level:.3g} %), {UNIT}:\n\n"
        + table(["arm", "against", "what", "seeds", "difference", "says"], rows)
    )


Found = Mapping[tuple[str, str, str], Result]


def _tuned(results: Mapping[str, Result], found: Found) -> str:
    end, chosen = (found.get(("tuned", "both tuned", metric)) for metric in ("report", "chosen"))
    if end is None or chosen is None:
        return "Whether Flat-LoRA beats LoRA when both are tuned was not measured yet."
    trials = len(results["tuned"]["trials"]["lora"])
    return (
        f"With {trials} trials for each, Flat-LoRA's held-out loss less LoRA's, {UNIT}, is {_said(end)} at the end of "
        f"training{_share(results['tuned'], end)} and {_said(chosen)} where other icons stop each."
    )


def _best_cell(results: Mapping[str, Result], found: Found) -> str:
    end, chosen = (found.get(("map", "best cell", metric)) for metric in ("report", "chosen"))
    if end is None or chosen is None:
        return "Which sigma and schedule are best was not measured yet."
    changes = parse_arm(end["arm"]).changes
    return (
        f"Of {len(results['map']['map'])} pairs of sigma and schedule, sigma {changes['sigma']:g} with the schedule "
        f"`{changes['sigma_schedule']}` ends best on the search icons: with seeds of its own, its loss less "
        f"LoRA's, {UNIT}, is {_said(end)} at the end{_share(results['map'], end)} and "
        f"{_said(chosen)} at the checkpoint that other icons choose."
    )


def _own_part(results: Mapping[str, Result], found: Found) -> str:
    rivals = {
        "Eq. 7's noise less iid noise of equal energy": ("draws", "Eq. 7 less iid", "report"),
        "Flat-LoRA less the control that search icons like best": ("controls", "against the best control", "report"),
        "Flat-LoRA less Bi-LoRA": ("methods", "against Bi-LoRA", "report"),
        "SAM over W less LoRA": ("sam", "SAM", "report"),
        "Flat-LoRA less LoRA at strength 1.5": ("again", "at strength 1.5", "stronger"),
        "Flat-LoRA less LoRA on a base in NF4": ("again", "on a base in NF4", "nf4"),
    }
    said = [
        f"{words}: {_said(found[key])}{_alone(results, found[key])}" for words, key in rivals.items() if key in found
    ]
    if not said:
        return "What the noise has over simpler means was not measured yet."
    return f"At the end of training, {UNIT}: {'; '.join(said)}."


def _alone(results: Mapping[str, Result], row: Result) -> str:
    """How what Flat-LoRA is compared with differs from LoRA itself, where its part says so."""
    pairs = results[row["part"]]["pairs"]
    pair = next((one for one in pairs if (one["arm"], one["against"]) == (row["against"], "lora")), None)
    return "" if pair is None else f", where that less LoRA is {interval(pair['report'], 1)}, uncorrected"


def _how_sure(found: Found) -> Sequence[str]:
    if not found:
        return ()
    said = f"Intervals are corrected for {len(HEADLINES)} comparisons, so that all hold together with 95 %"
    return (f"{said}, where nothing else is said.",)


def _said(row: Mapping[str, Any]) -> str:
    return f"{interval(row, 1)} ({verdict(row)})"


def _share(result: Result, row: Mapping[str, Any]) -> str:
    """The difference as a share of what the arm that it is compared with gains over the base."""
    losses = [one["report"] for one in result["rows"] if one["arm"] == row["against"] and one["label"] == ""]
    gain = result["base"]["report"] - statistics.fmean(losses)
    if gain <= 0:
        return ""
    return f", {abs(row['mean']) / gain:.1%} of LoRA's gain over the base,"


def _name(key: str) -> str:
    return parse_arm(key).name
