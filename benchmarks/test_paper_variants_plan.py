"""What the study of where flatness pays plans: its arms, seeds, trials and pairs."""

from __future__ import annotations

import argparse
import importlib.util

import pytest

from benchmarks.paper_variants import parser
from benchmarks.paper_variants_groups import planned_groups
from benchmarks.paper_variants_parts import PARTS
from benchmarks.paper_variants_plan import TRIAL_SEED
from benchmarks.paper_variants_rivals import adapter_choices, adapter_pairs, method_choices, method_pairs
from benchmarks.paper_variants_tuned import check_optuna, trial_arms
from flatlora_diffusion.compare.arms import parse_arm, plan
from flatlora_diffusion.config import TrainConfig

RATE = 5e-4


def options_of(*arguments: str) -> argparse.Namespace:
    return parser().parse_args(["--work", "work", *arguments])


@pytest.mark.parametrize("part", PARTS)
def test_every_arm_that_is_planned_may_be_trained_and_has_a_folder_of_its_own(part: str) -> None:
    config = TrainConfig().replace(max_train_steps=300)
    for group in planned_groups(part, options_of("--seeds", "2", "--fresh", "2")):
        runs = plan(config, [parse_arm(key) for key in group.arms], group.seeds, 6)
        assert len({run.run.folder for run in runs}) == len(runs) == len(group.arms) * len(group.seeds)
        assert set(group.pairs.values()) <= set(group.arms)


def test_no_arm_is_reported_on_the_seeds_that_it_was_chosen_by() -> None:
    planned = [group for part in PARTS for group in planned_groups(part, options_of("--map_seeds", "2"))]
    cells, *others = planned
    reported = {seed for group in others if not group.trial for seed in group.seeds}
    assert not reported & {*cells.seeds, TRIAL_SEED}
    assert TRIAL_SEED not in cells.seeds
    assert {seed for group in others if group.trial for seed in group.seeds} == {TRIAL_SEED}


def test_each_rival_has_three_trials_around_its_own_default() -> None:
    methods, adapters = method_choices(RATE), adapter_choices(RATE)
    choices = methods | adapters
    assert {len(set(arms)) for arms in choices.values()} == {3}
    assert len(methods) == 1 + 8
    assert len(adapters) == 2 + 8
    assert choices["lora"] == ["lora:learning_rate=0.00025", "lora", "lora:learning_rate=0.001"]
    assert choices["sam"] == ["sam:rho=0.02", "sam:rho=0.05", "sam:rho=0.125"]
    assert [parse_arm(key).changes["sigma"] for key in choices["flat-lora"]] == [0.16, 0.4, 1]
    assert set(method_pairs({name: arms[0] for name, arms in methods.items()}).values()) == {choices["lora"][0]}


def test_a_flat_adapter_has_the_plain_one_s_rate_and_flat_lora_s_sigma() -> None:
    chosen = {name: arms[2] for name, arms in adapter_choices(RATE).items()}
    pairs = adapter_pairs(chosen)
    flat_ones = [(parse_arm(key), parse_arm(plain)) for key, plain in pairs.items() if plain != chosen["lora"]]
    assert len(flat_ones) == 8
    for flat, plain in flat_ones:
        assert flat.changes == {"sigma": 1.0, "sigma_schedule": "constant", **plain.changes}


def test_the_map_has_every_sigma_with_every_schedule_and_lora_beside_them() -> None:
    arms = planned_groups("map", options_of())[0].arms
    assert len(arms) == 1 + 7 * 3
    assert {(parse_arm(key).changes["sigma_schedule"], parse_arm(key).changes["sigma"]) for key in arms[1:]} == {
        (schedule, sigma) for schedule in ("cosine", "constant", "down") for sigma in (0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.4)
    }


def test_both_methods_have_as_many_trials_within_the_same_bounds() -> None:
    pytest.importorskip("optuna")
    lora, flat_lora = (trial_arms(method, 20) for method in ("lora", "flat-lora"))
    assert len(set(lora)) == len(set(flat_lora)) == 20
    assert trial_arms("lora", 20) == lora
    for key in (*lora, *flat_lora):
        assert 1e-4 <= parse_arm(key).changes["learning_rate"] <= 2e-3


def test_without_optuna_the_tuned_part_says_so_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="sizes and tuned need the package optuna"):
        check_optuna()
