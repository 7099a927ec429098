"""What a flatness measurement says, in one sentence that needs no knowledge of losses, with how sure it is."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from flatlora_diffusion.config import DEFAULT_SIGMA
from flatlora_diffusion.evaluation.paired_statistics import paired_difference

from ..widgets.messages import percent
from ..widgets.run_cards import method_name

_LIMITS = (
    "That is how this one training came out. Flatter means that small changes disturb it less; whether its pictures "
    "are better is for the eyes to say, in the blind vote on the Compare tab."
)


def answer(result: Mapping[str, Any]) -> tuple[str, str]:
    """(the answer, what it rests on and what it leaves open) of a flatness.json; empty when two were not compared."""
    runs, sigmas = result["runs"], result["settings"]["sigmas"]
    methods = {name: facts["method"] for name, facts in runs.items()}
    plain, flat = (next((name for name in methods if methods[name] == one), None) for one in ("lora", "flat-lora"))
    if plain is None or flat is None or len(runs) != 2:
        return "", ""
    place = min(range(len(sigmas)), key=lambda at: abs(sigmas[at] - DEFAULT_SIGMA))
    rises = {one["name"]: one["rises"]["filter"][place]["values"] for one in result["figures"]}
    names = (method_name("lora"), method_name("flat-lora"))
    if statistics.mean(rises[plain]) <= 0:
        return (
            f"This measurement cannot tell which of {names[0]} and {names[1]} is flatter.",
            f"Random changes did not increase the loss of {names[0]}; choose the thorough measurement.",
        )
    share, margin = _relative(rises[plain], rises[flat])
    count = len(rises[plain])
    rest = f"From {count} random changes applied to both; 95 % interval. {_LIMITS}"
    if abs(share) <= margin:
        return (
            f"{names[1]} and {names[0]} are equally sensitive to small changes within the measurement's uncertainty.",
            f"The difference is {percent(share, True)}, with an uncertainty of {percent(margin)}, so there may "
            f"be none. {rest}",
        )
    better, worse = (names[1], names[0]) if share < 0 else names
    less = abs(share) if share < 0 else share / (1 + share)
    return (
        f"{better} is less sensitive: a small change of its weights disturbs it {percent(less)} less than {worse}.",
        f"Uncertainty: {percent(margin)}. {rest}",
    )


def _relative(plain: list[float], flat: list[float]) -> tuple[float, float]:
    """(how much more the second rises than the first, as a share of the first; half its 95 % interval)."""
    level = statistics.mean(plain)
    rise = paired_difference(flat, plain)
    return rise.mean / level, (rise.margin or 0.0) / level
