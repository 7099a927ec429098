"""What each part of `paper_variants` trains, as far as it is known before anything is: for the estimate."""

from __future__ import annotations

from argparse import Namespace

from benchmarks.paper_variants_plan import (
    AGAIN_PAIRS,
    CELL_KEYS,
    CELLS,
    DRAW_PAIRS,
    FELT_PAIRS,
    FRESH_SEED,
    PAPER,
    RADII,
    STRONG,
    TWICE,
    Group,
    control_pairs,
    controls,
    half,
    map_group,
    preset_group,
    sweeps,
)
from benchmarks.paper_variants_rivals import (
    adapter_choices,
    adapter_pairs,
    likely,
    method_choices,
    method_pairs,
    trials_of,
)


def planned_groups(part: str, options: Namespace) -> list[Group]:
    """The groups of a part but for the trials that Optuna draws; likely arms stand for those that it will choose."""
    rate, seeds = options.learning_rate, range(options.seeds)
    fresh = range(FRESH_SEED, FRESH_SEED + options.fresh)
    cells = dict.fromkeys(list(dict.fromkeys((PAPER, STRONG, *CELL_KEYS.values())))[:CELLS], "lora")
    methods, adapters = method_choices(rate), adapter_choices(rate)
    of_sam = Group({RADII[1]: "lora", TWICE: "lora"}, fresh[: options.seeds])
    groups = {
        "map": [map_group(options), Group(cells, seeds)],
        "draws": [Group(DRAW_PAIRS, seeds)],
        "controls": [Group(control_pairs(rate), seeds), trials_of(controls(rate))],
        "tuned": [Group({STRONG: "lora"}, fresh)],
        "sizes": sweeps("lora", STRONG, options.fresh),
        "methods": [*map(trials_of, methods.values()), Group(method_pairs(likely(methods)), seeds)],
        "sam": [trials_of(RADII), of_sam],
        "forgetting": [trials_of(RADII), of_sam],
        "adapters": [*map(trials_of, adapters.values()), Group(adapter_pairs(likely(adapters)), seeds)],
        "preset": [preset_group(options.seeds)],
        "felt": [Group(FELT_PAIRS, seeds)],
        "again": [Group(AGAIN_PAIRS, fresh)],
        "domain": [Group({**FELT_PAIRS, half(rate): "lora"}, seeds, domain=True)],
    }
    return groups[part]
