"""The shares of a perturbation of A and B: those of steps made by hand, and a run on made-up icons."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import normal
from tiny_random_sdxl import save_icons, save_tiny_random_sdxl

from benchmarks.factor_share import METHODS, SETTINGS, Factors, main, shares

CLEAN = Factors(normal(0, 2, 9).double(), normal(1, 5, 2).double(), scale=1.5)


def found(moved: Factors, clean: Factors = CLEAN) -> tuple[float | None, float | None]:
    values = shares({"layer": clean}, {"layer": moved})
    return values["eps_B A"], values["rows of A"]


def test_a_step_of_b_is_the_dominant_term_alone_and_lies_in_the_rows_of_a() -> None:
    assert found(replace(CLEAN, up=CLEAN.up + normal(2, 5, 2))) == (pytest.approx(1), pytest.approx(1))


def test_a_step_of_a_has_none_of_the_dominant_term_and_is_split_at_the_rows_of_a() -> None:
    step = normal(3, 2, 9).double()
    inside = step @ torch.linalg.pinv(CLEAN.down) @ CLEAN.down
    expected = float((CLEAN.up @ inside).square().sum() / (CLEAN.up @ step).square().sum())
    assert found(replace(CLEAN, down=CLEAN.down + step)) == (0, pytest.approx(expected))
    assert 0.01 < expected < 0.9
    assert found(replace(CLEAN, down=2 * CLEAN.down)) == (0, pytest.approx(1))


def test_energies_are_those_of_all_layers_together() -> None:
    big = replace(CLEAN, scale=3.0)
    steps = {"a": replace(CLEAN, up=2 * CLEAN.up), "b": replace(big, down=2 * big.down)}
    assert shares({"a": CLEAN, "b": big}, steps)["eps_B A"] == pytest.approx((1 / (1 + 4)) ** 0.5)


def test_nothing_is_said_of_no_perturbation() -> None:
    assert found(CLEAN) == (None, None)


def test_each_method_is_measured_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, icons = tmp_path / "out.json", save_icons(tmp_path / "icons", 3)
    made_up = {"pretrained_model_name_or_path": str(save_tiny_random_sdxl(tmp_path / "base")), "rank": 2}
    made_up |= {"instance_data_dir": str(icons)}
    main(["--at", "0", "2", "--out", str(out)], {**SETTINGS, **made_up, "train_batch_size": 2})
    result = json.loads(out.read_text(encoding="utf-8"))
    assert list(result["shares"]) == list(METHODS)
    sam, noise, flat = (result["shares"][method] for method in METHODS)
    assert sam["0"] == {"eps_B A": pytest.approx(1), "rows of A": pytest.approx(1)}, "B is 0"
    assert noise["0"] == {"eps_B A": None, "rows of A": None}, "nor has it rows that noise could be scaled to"
    assert 0 < noise["2"]["rows of A"] < 1
    assert 0 < flat["2"]["rows of A"] < 0.5
    assert "lora-sam, eps_B A" in capsys.readouterr().out


def test_the_documentation_has_the_figures_of_the_last_step_that_was_measured() -> None:
    kept = json.loads((Path(__file__).parent / "factor_share.json").read_text(encoding="utf-8"))["shares"]
    last = {method: list(by_step.items())[-1] for method, by_step in kept.items()}
    (steps, sam), (_, noise), (_, flat) = (last[method] for method in METHODS)
    of_sam, of_noise = sam["rows of A"], noise["rows of A"]
    wanted = (
        f"After {steps} steps on the tiny base {sam['eps_B A']:.3f} of the length of LoRA-SAM's step is that term, "
        f"and {of_sam:.2%} of its energy lies in the rows of A; of factor noise it is {noise['eps_B A']:.2f} "
        f"and {of_noise:.0%}, and of Flat-LoRA's eps {flat['rows of A']:.1%} lies there"
    )
    text = (Path(__file__).parents[1] / "docs" / "flags.md").read_text(encoding="utf-8")
    assert wanted.replace("%", " %") in " ".join(text.split())
