"""What each part of `paper_variants` trains and compares, and what its JSON says."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from benchmarks.paper_variants_bench import trained
from benchmarks.paper_variants_felt import felt_by_arm, stressed
from benchmarks.paper_variants_figures import Result, chosen_cells, compared
from benchmarks.paper_variants_forgetting import at_equal_forgetting, curves
from benchmarks.paper_variants_plan import (
    AGAIN_PAIRS,
    CELLS,
    DRAW_PAIRS,
    EARLY,
    FELT_PAIRS,
    FRESH_SEED,
    FULL,
    IID,
    NOISED,
    PRESET,
    RADII,
    STRONG,
    THIN,
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
    Choices,
    adapter_choices,
    adapter_pairs,
    method_choices,
    method_pairs,
    trials_of,
)
from benchmarks.paper_variants_study import Study, settings_of_preset
from benchmarks.paper_variants_tuned import METHODS, trial_group
from flatlora_diffusion.compare.arms import parse_arm, plan
from flatlora_diffusion.compare.material import FLAT_ICONS
from flatlora_diffusion.gallery.grid import labelled_grid

MAP_PICTURE = "paper_variants_map.webp"


def map_part(study: Study) -> Result:
    group = map_group(study.options)
    first = study.rows(group)
    cells = chosen_cells(first, CELLS)
    rows, pairs = study.compared({"": Group(dict.fromkeys(cells, "lora"), range(study.options.seeds))})
    _draw_map(study, group)
    return {
        "map": compared(first, group.pairs, study.bench(group).base()),
        "chosen": cells,
        "pairs": pairs,
        "rows": rows,
        "headlines": {"best cell": [cells[0], "lora"]},
    }


def _draw_map(study: Study, group: Group) -> None:
    """The same prompts by the base, LoRA and every cell."""
    bench = study.bench(group)
    files = {planned.arm.name: planned.lora for planned in bench.planned(group) if planned.seed == group.seeds[0]}
    strips = {"Base": bench.strip(None)} | {name: bench.strip(file) for name, file in files.items()}
    image = labelled_grid(list(strips.values()), list(strips), [], 64)
    image.save(study.options.out / MAP_PICTURE, quality=85)


def draws_part(study: Study) -> Result:
    rows, pairs = study.compared({"": Group(DRAW_PAIRS, range(study.options.seeds))})
    names = {"Eq. 7 less iid": [FULL, IID], "thin less full draws": [THIN, FULL]}
    return {"pairs": pairs, "rows": rows, "headlines": names}


def controls_part(study: Study) -> Result:
    rate = study.options.learning_rate
    group = Group(control_pairs(rate), range(study.options.seeds))
    best, trials = _chosen(study, {"control": trials_of(controls(rate))})
    rows, pairs = study.compared({"": group})
    pairs += compared(rows, {STRONG: best["control"]}, study.bench(group).base())
    names = {"against the best control": [STRONG, best["control"]]}
    return {"trials": trials, "pairs": pairs, "rows": rows, "headlines": names}


def tuned_part(study: Study) -> Result:
    best, trials = _tuned(study)
    lora, flat_lora = best["lora"], best["flat-lora"]
    group = Group({flat_lora: lora}, range(FRESH_SEED, FRESH_SEED + study.options.fresh))
    rows, pairs = study.compared({"": group})
    return {"trials": trials, "pairs": pairs, "rows": rows, "headlines": {"both tuned": [flat_lora, lora]}}


def sizes_part(study: Study) -> Result:
    best, _ = _tuned(study)
    groups = sweeps(best["lora"], best["flat-lora"], study.options.fresh)
    rows, pairs = study.compared({_label(group, study.options): group for group in groups})
    return {"pairs": pairs, "rows": rows}


def _tuned(study: Study) -> tuple[dict[str, str], dict[str, list[Result]]]:
    return _chosen(study, {method: trial_group(method, study.options.trials) for method in METHODS})


def _chosen(study: Study, groups: Mapping[str, Group]) -> tuple[dict[str, str], dict[str, list[Result]]]:
    """By name the arm of its trials that ends with the lowest loss on the search icons, and what all ended with."""
    best, trials = {}, {}
    for name, group in groups.items():
        found = study.rows(group)
        trials[name] = [{"arm": row["arm"], "search": row["points"][-1]["search"]} for row in found]
        best[name] = min(trials[name], key=lambda trial: trial["search"])["arm"]
    return best, trials


def _label(group: Group, options: argparse.Namespace) -> str:
    """What a sweep changes."""
    if group.images is not None:
        return f"{group.images} images"
    if group.length != 1:
        return f"{round(options.steps * group.length)} steps"
    return f"rank {parse_arm(group.arms[0]).changes['rank']}"


def methods_part(study: Study) -> Result:
    result, best, group = _rivals(study, method_choices(study.options.learning_rate), method_pairs)
    flat_lora, bi_lora = best["flat-lora"], best["bi-lora"]
    result["pairs"] += compared(result["rows"], {flat_lora: bi_lora}, study.bench(group).base())
    return {**result, "headlines": {"against Bi-LoRA": [flat_lora, bi_lora]}}


def sam_part(study: Study) -> Result:
    sam, group, trials = _best_sam(study)
    rows, pairs = study.compared({"": group})
    pairs += compared(rows, {sam: TWICE}, study.bench(group).base())
    return {"trials": {"sam": trials}, "pairs": pairs, "rows": rows, "headlines": {"SAM": [sam, "lora"]}}


def forgetting_part(study: Study) -> Result:
    sam, group, _ = _best_sam(study)
    bench = study.bench(group)
    rows = curves(bench, group)
    return {"rows": rows, "equal": at_equal_forgetting(rows, {sam: "lora", TWICE: "lora"}, bench.base())}


def _best_sam(study: Study) -> tuple[str, Group, list[Result]]:
    """SAM with the radius that the search icons like best, its group with seeds of its own, and the trials."""
    best, trials = _chosen(study, {"sam": trials_of(RADII)})
    seeds = range(FRESH_SEED, FRESH_SEED + study.options.seeds)
    return best["sam"], Group({best["sam"]: "lora", TWICE: "lora"}, seeds), trials["sam"]


def adapters_part(study: Study) -> Result:
    return _rivals(study, adapter_choices(study.options.learning_rate), adapter_pairs)[0]


def _rivals(
    study: Study, choices: Choices, pairs_of: Callable[[Mapping[str, str]], dict[str, str]]
) -> tuple[Result, dict[str, str], Group]:
    """What rivals that may choose among these arms come to, each one's choice, and the group that was reported."""
    best, trials = _chosen(study, {name: trials_of(arms) for name, arms in choices.items()})
    group = Group(pairs_of(best), range(study.options.seeds))
    rows, pairs = study.compared({"": group})
    bench = study.bench(group)
    first = [planned for planned in bench.planned(group) if planned.seed == group.seeds[0]]
    plain = next(planned for planned in first if planned.arm.key == best["lora"])
    cost = {planned.arm.key: bench.cost(planned, plain) for planned in first}
    return {"trials": trials, "cost": cost, "pairs": pairs, "rows": rows}, best, group


def preset_part(study: Study) -> Result:
    rows, pairs = study.compared({"": preset_group(study.options.seeds)})
    return {"preset": PRESET, "of_preset": settings_of_preset(PRESET), "pairs": pairs, "rows": rows}


def felt_part(study: Study) -> Result:
    group = Group(FELT_PAIRS, range(study.options.seeds))
    (second,) = plan(study.config(FLAT_ICONS, "second-lora"), [parse_arm("lora")], [0], 1)
    trained(second)
    return felt_by_arm(study.bench(group), group, second.lora, study.options.base, study.options.other_base)


def again_part(study: Study) -> Result:
    """What `felt` found, with fresh seeds: seeds that had a part in the finding cannot prove it."""
    options = study.options
    group = Group(AGAIN_PAIRS, range(FRESH_SEED, FRESH_SEED + options.fresh))
    bench = study.bench(group)
    rows, of_base = stressed(bench, group, options.base), bench.base()
    pairs = [one for of in (AGAIN_PAIRS, {STRONG: EARLY}, {STRONG: NOISED}) for one in compared(rows, of, of_base)]
    names = {name: [STRONG, "lora"] for name in ("at strength 1.5", "on a base in NF4")}
    return {"pairs": pairs, "rows": rows, "headlines": names}


def domain_part(study: Study) -> Result:
    pairs = {**FELT_PAIRS, half(study.options.learning_rate): "lora"}
    rows, found = study.compared({"": Group(pairs, range(study.options.seeds), domain=True)})
    return {"pairs": found, "rows": rows}


PARTS: dict[str, Callable[[Study], Result]] = {
    "map": map_part,
    "draws": draws_part,
    "controls": controls_part,
    "tuned": tuned_part,
    "sizes": sizes_part,
    "methods": methods_part,
    "sam": sam_part,
    "forgetting": forgetting_part,
    "adapters": adapters_part,
    "preset": preset_part,
    "felt": felt_part,
    "again": again_part,
    "domain": domain_part,
}
