"""Nulls belong to the methods that are compared; what they say is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan_runs
from flatlora_diffusion.compare.controls import (
    OTHER_DRAWS,
    SECOND_EPS,
    SIGMA_0,
    RunOutputs,
    control_rows,
    make_controls,
)
from flatlora_diffusion.config import METHODS, TrainConfig


def planned(arms: Sequence[str], init_seed: int | None = None) -> dict[str, PlannedRun]:
    """The nulls of these arms by their keys, as runs of seed 7."""
    config = TrainConfig.from_dict({"max_train_steps": 2})
    nulls = [null.arm for null in make_controls([parse_arm(text) for text in arms], 7, init_seed)]
    return {one.arm.key: one for one in plan_runs(config, nulls, [7], 1)}


def names(arms: Sequence[str]) -> dict[str, str]:
    """Each null and the arm that it is compared with, by their names."""
    return {null.arm.name: null.against.name for null in make_controls([parse_arm(text) for text in arms], 7)}


def test_lora_and_flat_lora_have_three() -> None:
    assert names(["lora", "flat-lora"]) == {
        "Flat-LoRA at sigma 0": "LoRA",
        "LoRA with other draws": "LoRA",
        "Flat-LoRA with another eps": "Flat-LoRA",
    }


@pytest.mark.parametrize("method", METHODS)
def test_only_compared_methods_are_trained(method: str) -> None:
    for arms in ([method], ["lora", method] if method != "lora" else ["lora", "lora:rank=8"], [method, "lora:rank=8"]):
        compared = {parse_arm(text).method for text in arms}
        found = planned(arms).values()
        assert {one.arm.method for one in found} <= compared
        assert all(one.config.perturb.method == one.arm.method for one in found)


def test_plain_methods_have_only_the_control_with_other_draws() -> None:
    assert names(["lora", "sam"]) == {"LoRA with other draws": "LoRA"}
    assert names(["sam", "lora"]) == {"SAM with other draws": "SAM"}
    assert names(["flat-lora"]) == {
        "Flat-LoRA with other draws": "Flat-LoRA",
        "Flat-LoRA with another eps": "Flat-LoRA",
    }


def test_a_null_has_the_settings_of_its_arm() -> None:
    found = planned(["lora:rank=8", "flat-lora:rank=8,sigma=0.2,perturb_noise=iid"])
    assert {one.config.adapter.rank for one in found.values()} == {8}
    assert found[SIGMA_0].config.perturb.sigma == 0.0
    assert found[SECOND_EPS].config.perturb.sigma == 0.2
    assert found[SIGMA_0].arm.name == "Flat-LoRA, rank 8 at sigma 0"


def test_sigma_0_is_compared_with_a_lora_of_the_same_settings() -> None:
    assert SIGMA_0 not in planned(["lora", "flat-lora:rank=8"])
    assert SIGMA_0 in planned(["lora", "flat-lora:rank=8", "flat-lora:perturb_draw=full"])
    assert SIGMA_0 in planned(["sam", "flat-lora:sigma=0.1", "lora"])


def test_they_differ_by_what_their_names_say() -> None:
    found = planned(["lora", "flat-lora"])
    sigma_0, other_draws, second_eps = (found[key].config for key in (SIGMA_0, OTHER_DRAWS, SECOND_EPS))
    assert (sigma_0.run.seed, sigma_0.perturb.sigma) == (7, 0.0)
    assert other_draws.run.seed not in (7, None)
    assert other_draws.adapter.lora_init_seed == 7
    assert second_eps.run.seed == 7
    assert second_eps.perturb.perturb_seed not in (7, None)
    assert planned(["lora"], init_seed=5)[OTHER_DRAWS].config.adapter.lora_init_seed == 5
    assert planned(["lora:lora_init_seed=3"], init_seed=5)[OTHER_DRAWS].config.adapter.lora_init_seed == 3


def test_rows_measure_pictures_weights_and_losses_of_nulls_and_of_the_arms_themselves(tmp_path: Path) -> None:
    def end(name: str, grey: int, weight: float) -> RunOutputs:
        picture, lora = tmp_path / f"{name}.png", tmp_path / f"{name}.safetensors"
        Image.new("RGB", (4, 4), (grey, grey, grey)).save(picture)
        save_file({"down": torch.tensor([3.0, 4.0]) * weight}, lora)
        return RunOutputs(lora, [picture])

    outputs = {
        "lora": end("lora", 10, 1.0),
        "flat-lora": end("flat", 20, 2.0),
        SIGMA_0: end("sigma", 10, 1.0),
        OTHER_DRAWS: end("other", 40, 1.5),
        SECOND_EPS: end("eps", 25, 2.0),
    }
    losses = {key: {7: {"heldout_loss": 0.1 * place}} for place, key in enumerate(outputs)}
    losses[SIGMA_0] = losses["lora"]
    arms = [parse_arm("lora"), parse_arm("flat-lora")]
    rows = {row["name"]: row for row in control_rows(arms, make_controls(arms, 7), outputs, losses, 7)}
    figures = {
        name: (row["picture_difference"], row["weight_difference"], row["heldout_difference"])
        for name, row in rows.items()
    }
    assert figures == {
        "Flat-LoRA at sigma 0 against LoRA": (0, 0, 0),
        "LoRA with other draws against LoRA": pytest.approx((30, 0.5, 0.3)),
        "Flat-LoRA with another eps against Flat-LoRA": pytest.approx((5, 0, 0.3)),
        "Flat-LoRA against LoRA": pytest.approx((10, 1, 0.1)),
    }
