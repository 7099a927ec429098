"""The flatness section of docs/images.md, from the flatness.json of runs of rank 1 and 16."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from flatlora_diffusion.flatness.weight_space import Estimate

Result = dict[str, Any]


def flatness_section(flatness: Result) -> str:
    arms = flatness["figures"]
    rows = [["loss, training images", *(f"{arm['losses']['train']:.5f}" for arm in arms)]]
    for kind, words in (("filter", "Eq. 7"), ("iid", "iid")):
        for place, sigma in enumerate(flatness["settings"]["sigmas"]):
            rows.append(
                [f"expected rise, {words}, sigma {sigma:g}", *(_estimate(arm["rises"][kind][place]) for arm in arms)]
            )
    rows += [_less_lora(arms, place, sigma) for place, sigma in enumerate(flatness["settings"]["sigmas"])]
    for place, radius in enumerate(flatness["settings"]["radii"]):
        rows.append([f"worst-case rise, radius {radius:g}", *(f"{arm['worst'][place]:.2e}" for arm in arms)])
    for metric, words in (("filter", "filter-normalized"), ("raw", "raw")):
        if all(metric in arm["curvature"] for arm in arms):
            found = [arm["curvature"][metric] for arm in arms]
            rows.append([f"largest eigenvalue, {words}", *(f"{one['eigenvalues'][0]['value']:.3e}" for one in found)])
            rows.append([f"trace, {words}", *(_estimate(one["trace"]) for one in found)])
    for name in ("LoRA in fp16", "LoRA in fp8", "LoRA in int8", "base in int8, LoRA whole", "LoRA cut to rank 1"):
        cells = [f"{arm['variants'][name]['train']:.5f}" if name in arm["variants"] else "" for arm in arms]
        rows.append([f"loss, {name}", *cells])
    columns = ["", *(_run_name(arm["name"]) for arm in arms)]
    return (
        "## Flatness, and the loss surface for rank 1 and 16\n\nMeasured at W' of the first seed of each arm "
        "(`flatlora flatness RUN…`), all weights that the LoRA adapts, common draws; ± is the "
        f"error over draws of the noise, not over trainings.\n\n{table(columns, rows)}\n\n"
        "Loss over two random filter-normalized directions that all share (Li et al., arXiv:1712.09913), the analogue "
        "of the paper's Fig. 6:\n\n![Loss surfaces around W'](flatness_surface.png)\n\n"
        "![Expected rise of the loss by sigma](flatness_rise.png)"
    )


def _less_lora(arms: Sequence[Result], place: int, sigma: float) -> list[str]:
    """The rise of each Flat-LoRA less that of the LoRA before it, draw by draw."""
    cells = ["", *[""] * len(arms)]
    cells[0] = f"rise less LoRA's of the same rank, Eq. 7, sigma {sigma:g}"
    for number, (before, arm) in enumerate(pairwise(arms), 1):
        if arm["name"].startswith("flat"):
            ours, theirs = (Estimate(tuple(one["rises"]["filter"][place]["values"])) for one in (arm, before))
            cells[number + 1] = _estimate({"values": ours.minus(theirs).values})
    return cells


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _estimate(found: Result) -> str:
    estimate = Estimate(tuple(found["values"]))
    return f"{estimate.mean:.2e} ± {estimate.error:.0e}"


def _run_name(name: str) -> str:
    """`flat-lora-rank-1/seed-0` as it reads in a table."""
    arm = name.split("/")[0]
    return {"Base": "Base"}.get(
        arm, arm.replace("flat-lora", "Flat-LoRA").replace("lora-", "LoRA-").replace("-rank-", ", rank ")
    )
