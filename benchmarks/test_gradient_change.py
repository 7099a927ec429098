"""`gradient_change`: its gradients beside autograd's on weights that are moved, a small study, what the page says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lora_by_hand import add_to_base, gradients, lora_layers
from tiny_models import normal, toy_case
from tiny_random_sdxl import save_icons, save_tiny_random_sdxl

from benchmarks.gradient_change import PLAN, SETTINGS, Probe, main, mean_cosine, of_draws, sketch, total
from benchmarks.gradient_change_page import (
    KINDS,
    OLD,
    PAGE,
    SAM_LENGTH,
    Result,
    along_gradient,
    draw_figure,
    in_common,
    lifts,
    of_kind,
    of_noise,
    over_seeds,
    passes,
    read,
    sigmas,
    tables,
)
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.evaluation.crossed_statistics import crossed_difference
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train_step

OLDER = [kind for kind, (_, source) in KINDS.items() if source == OLD]


def test_slopes_and_gradients_at_a_moved_w_are_those_of_autograd() -> None:
    case, other = toy_case(), toy_case()
    probe = Probe([case.model])
    slope = probe.slope(lambda: case.loss().backward())
    bases = [layer.get_base_layer().weight.requires_grad_() for layer in lora_layers(other.model).values()]
    expected = torch.autograd.grad(other.loss(), bases)
    for one, wanted in zip(slope, expected, strict=True):
        torch.testing.assert_close(one, wanted)
    case.model.zero_grad()
    with probe.moved(slope):
        case.loss().backward()
    found = gradients(case.model)
    for base in bases:
        base.requires_grad_(False)
    moved = dict(zip(lora_layers(other.model), expected, strict=True))
    other.loss(add_to_base(other.model, moved)).backward()
    wanted_by_name = gradients(other.model)
    assert {name for name in found if "lora" in name} == wanted_by_name.keys()
    for name, value in wanted_by_name.items():
        torch.testing.assert_close(found[name], value)


def test_a_sketch_projects_on_what_the_slope_makes_of_random_columns() -> None:
    wide, kernel = normal(0, 6, 9), normal(1, 5, 3, 2, 2)
    low = normal(2, 6, 2) @ normal(3, 2, 9)
    found = sketch([wide, kernel, low], 2, seed=7)
    torch.testing.assert_close(found[2], low)
    for one, whole in zip(found, (wide, kernel, low), strict=True):
        assert one.shape == whole.shape
        own, left = one.flatten(1).double().numpy(), (whole - one).flatten(1).double().numpy()
        assert np.linalg.matrix_rank(own, tol=1e-5) == 2
        np.testing.assert_allclose(own.T @ left, 0, atol=1e-5)
    assert found[0].norm() < wide.norm()


def test_the_common_share_is_what_draws_have_the_same() -> None:
    """A signal of length 2 and noises of length 1 at right angles to it and to each other: 4 parts of 5."""
    changes = torch.zeros(4, 8, dtype=torch.float64)
    changes[:, 0] = 2
    changes[range(4), range(1, 5)] = 1
    plain, sam = torch.eye(8, dtype=torch.float64)[6], torch.eye(8, dtype=torch.float64)[0]
    found = of_draws(changes, plain, sam)
    assert found["common"] == pytest.approx(4 / 5)
    assert found["halves"] == pytest.approx(4 / 4.5)
    assert found["mean to SAM"] == pytest.approx(2 / (4 + 1 / 4) ** 0.5)
    assert found["mean length"] == pytest.approx(((4 + 1 / 4) / 5) ** 0.5)
    assert found["kept"] == pytest.approx(1 / 6**0.5)
    assert (found["of SAM"], found["to gradient"]) == (pytest.approx(5**0.5), 0)
    assert passes(crossed_difference([[0.2], [0.2]])) == "4 (4 to 4)"


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    rows = normal(4, 5, 7)
    wanted = np.corrcoef(np.c_[rows.numpy(), -rows.numpy()])[:5, :5]  # of rows whose mean is 0
    assert mean_cosine(rows) == pytest.approx((wanted.sum() - 5) / 20, abs=1e-5)


def made_up(folder: Path) -> dict[str, Any]:
    return {
        **SETTINGS,
        "pretrained_model_name_or_path": str(save_tiny_random_sdxl(folder / "base")),
        "instance_data_dir": str(save_icons(folder / "icons", 7)),
        "resolution": 32,
        "rank": 2,
    }


@pytest.mark.long
def test_a_study_in_miniature_is_measured_once_and_makes_a_page(tmp_path: Path) -> None:
    settings, plan = (
        made_up(tmp_path),
        {**PLAN, "first": 5, "steps": 1, "images": 2, "draws": {"low_rank": 2, "full": 2}},
    )
    arguments = ["--work", str(tmp_path / "work"), "--seeds", "2", "--out", str(tmp_path / "out.json")]
    main(arguments, settings, plan)
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()}
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    main(arguments, settings, plan)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "work").iterdir()} == written
    step = result["seeds"][0]["steps"][0]
    assert step["eps"]["1"]["SAM"]["cosine"] == pytest.approx(1)
    assert step["slopes"]["rank 8"] == pytest.approx(1, abs=0.1)
    assert step["noise"]["full"]["0.4"]["eps"] == pytest.approx(8 * step["noise"]["full"]["0.05"]["eps"])
    assert step["noise"]["full"]["0.4"]["of gradient"] > step["noise"]["full"]["0.05"]["of gradient"]
    assert 0 < result["bi-lora"][0]["length"] < 1.001
    assert "momentum" in tables(result)
    draw_figure(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_what_is_measured_is_a_plain_lora(tmp_path: Path) -> None:
    settings = made_up(tmp_path) | {"output_dir": str(tmp_path / "run"), "seed": 0}
    plain = TrainConfig.from_dict({**settings, "method": "lora", "rho_rise": None})
    states = [prepare(plain, load_samples(Path(settings["instance_data_dir"])).samples) for _ in range(2)]
    states[1].gradient = probe = Probe([states[1].sdxl.unet])
    slopes = []
    for step in range(3):
        for state in states:
            train_step(state, step)
        slopes.append(probe.earlier[-1])
    for one, other in zip(*(state.trainable.values() for state in states), strict=True):
        assert torch.equal(one, other)
    by_hand = total([[0.81 * one for one in slopes[0]], [0.9 * one for one in slopes[1]], slopes[2]])
    for one, other in zip(probe.momentum, by_hand, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture(scope="module")
def result() -> Result:
    return read()


def test_the_page_has_the_committed_figures(result: Result) -> None:
    assert tables(result) in PAGE.read_text(encoding="utf-8")
    assert len(result["seeds"]) == len(result["bi-lora"]) >= 5
    assert {len(seed["steps"]) for seed in result["seeds"]} == {8}


def test_the_page_says_what_older_batches_do(result: Result) -> None:
    said = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "slopes dL/dW of two batches are at right angles" in said
    assert all(abs(seed["alike"]["batches"]) < 0.02 for seed in result["seeds"])
    assert "an eighth to a third of what SAM does" in said
    assert "in the mean no cosine is left" in said
    for kind in OLDER:
        cosines, lengths = of_kind(result, kind, "cosine"), of_kind(result, kind, "of SAM")
        found = over_seeds(cosines)
        assert found.low is not None
        assert found.high is not None
        assert found.low < 0 < found.high, kind
        assert abs(over_seeds(lifts(result, kind)).mean) < 0.05, "hardly lifts the loss"
        assert 0.1 < over_seeds(lengths).mean < 0.37
        steps = [one for own in cosines for one in own]
        assert min(steps) < -0.4, "opposes it in another"
        assert max(steps) > 0.4
    assert "a sketch of rank 4 does what the whole slope does" in said
    assert over_seeds(of_kind(result, "rank 4", "cosine")).mean > 0.99
    assert over_seeds(of_kind(result, "rank 4", "of SAM")).mean > 0.95


def test_the_page_says_what_noise_does(result: Result) -> None:
    said = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert "Noise as short as SAM's eps does nothing" in said
    assert over_seeds(of_kind(result, SAM_LENGTH, "of gradient")).mean < 0.01
    assert "Up to sigma 0.2 the gradient at W + eps still points where the gradient at W does" in said
    assert all(over_seeds(of_noise(result, sigma, "kept")).mean > 0.95 for sigma in ("0.05", "0.1", "0.2"))
    shares = {sigma: over_seeds(in_common(result, sigma)) for sigma in sigmas(result)}
    assert "is at most some hundredths of a change's energy; it grows with about the square of sigma" in said
    assert 0.03 < shares["0.4"].mean < 0.1
    assert shares["0.4"].mean / shares["0.2"].mean == pytest.approx(4, rel=0.35)
    assert "At sigma 0.4 a dozen draws show the pull" in said
    assert shares["0.4"].low is not None
    assert shares["0.4"].low > 0
    assert over_seeds(of_noise(result, "0.4", "halves")).mean > 0.1
    assert "Part of the pull only shortens the gradient" in said
    shorter = over_seeds(along_gradient(result, "0.4"))
    assert shorter.high is not None
    assert shorter.high < 0
