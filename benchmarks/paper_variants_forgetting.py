"""At equal forgetting: the same LoRAs at many strengths, compared where two have cost flat icons as much.

A LoRA that learns more forgets more, and its strength trades the one for the other when pictures are made. So two arms
are compared on the curve of held-out loss over the loss of flat icons, between two strengths by a straight line.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise

from benchmarks.paper_variants_bench import MANY, Bench, identity, trained
from benchmarks.paper_variants_figures import Result, Row, difference
from benchmarks.paper_variants_plan import Group, Pairs
from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.losses import UNGROUPED

STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
SHARES = (0.5, 1.0)  # of what the other arm forgets at strength 1

Loss = Mapping[str, float]
"""That of the reported and of the flat icons."""


def curves(bench: Bench, group: Group) -> list[Row]:
    """Each run's losses by strength."""
    rows = []
    for planned in bench.planned(group):
        trained(planned)
        found = {f"{at:g}": bench.reported.losses(planned.lora, at) for at in STRENGTHS}
        losses = {at: {name: one[UNGROUPED] for name, one in of.items()} for at, of in found.items()}
        rows.append({**identity(planned), "strengths": losses})
        print(f"{planned.label}: measured at {len(STRENGTHS)} strengths", flush=True)
    return rows


def curves_left(bench: Bench, planned: PlannedRun) -> float:
    """How many samples the UNet has still to see of a run that is trained, in passes of one alone."""
    return MANY * sum(bench.reported.losses_left(planned.lora, at) for at in STRENGTHS)


def at_equal_forgetting(rows: Sequence[Row], pairs: Pairs, base: Loss) -> list[Result]:
    """Each pair's differences where both forget such a share of what the second forgets at strength 1.

    `strength` is the first arm's there, the mean of the seeds. Raises ValueError where one never forgets so much.
    """
    walks = {(row["arm"], row["seed"]): _walk(row, base) for row in rows}
    results = []
    for arm, against in pairs.items():
        seeds = sorted(seed for key, seed in walks if key == arm and (against, seed) in walks)
        for share in SHARES:
            points = []
            for seed in seeds:
                one, other = walks[arm, seed], walks[against, seed]
                forgotten = base["flat"] + share * (other[1.0]["flat"] - base["flat"])
                points.append((_where(one, forgotten), _where(other, forgotten)))
            losses = [(one[1], other[1]) for one, other in points]
            strength = statistics.fmean(one[0] for one, _ in points)
            found = {"arm": arm, "against": against, "share": share, "seeds": seeds, "strength": strength}
            results.append({**found, "report": difference(losses)})
    return results


def _walk(row: Row, base: Loss) -> dict[float, Loss]:
    return {0.0: base} | {float(at): loss for at, loss in row["strengths"].items()}


def _where(walk: Mapping[float, Loss], forgotten: float) -> tuple[float, float]:
    """The strength at which flat icons first have this loss, and the loss of the reported icons there.

    Raises ValueError where no strength that was measured has it.
    """
    for (low, one), (high, other) in pairwise(walk.items()):
        if one["flat"] <= forgotten <= other["flat"]:
            share = (forgotten - one["flat"]) / (other["flat"] - one["flat"]) if other["flat"] > one["flat"] else 0.0
            return low + share * (high - low), one["report"] + share * (other["report"] - one["report"])
    raise ValueError(f"no strength up to {max(walk):g} lets the flat icons' loss be {forgotten:g}")
