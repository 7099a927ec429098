"""The study on a tiny encoder and made-up images: what it trains, chooses, keeps and compares."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from benchmarks import paper_study, paper_study_surface
from benchmarks.paper_study import Runs, parser_of, study
from benchmarks.paper_study_adapters import adapted, noise_of
from benchmarks.paper_study_arms import ARMS, RATES, TRIALS, VARIANT_ARMS
from benchmarks.paper_study_run import Classifier, _adapted, _train, run
from benchmarks.paper_study_settings import Settings, Variant
from benchmarks.paper_study_surface import draw_surfaces
from flatlora_diffusion import LandscapeConfig
from flatlora_diffusion.method.settings import Settings as NoiseSettings

USUAL = Settings(lr=1e-3, steps=3)


@dataclass(frozen=True)
class Dots:
    """Rows of 8 x 8 images of which the class is the brighter half."""

    images: Tensor
    labels: Tensor

    def rows(self, chosen: Tensor) -> tuple[tuple[Tensor], Tensor]:
        return (self.images[chosen],), self.labels[chosen]

    def parts(self, most: int | None) -> Sequence[Tensor]:
        return torch.arange(len(self.labels[:most])).split(64)


class DotClassifier(Classifier):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        self.encoder = ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes), add_pooling_layer=False)
        self.head = nn.Linear(24, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(images).last_hidden_state[:, 0])
        return logits


class DotBench:
    lr_factor = 1.0
    targets = r"layers\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        images = torch.rand(24, 3, 8, 8, generator=rng)
        rows = Dots(images, (images[:, :, :4].mean((1, 2, 3)) > images[:, :, 4:].mean((1, 2, 3))).long())
        self.train = rows
        self.tests = {"validation": rows, "test": rows, "darker": Dots(images / 2, rows.labels)}

    def model(self) -> Classifier:
        return DotClassifier()


@pytest.fixture(scope="module")
def bench() -> DotBench:
    return DotBench()


def last_loss(bench: DotBench, settings: Settings, seed: int = 1) -> float:
    loss: float = run(bench, settings, seed, only_validation=True)["last_loss"]
    return loss


def test_runs_of_one_seed_differ_by_their_settings_alone(bench: DotBench) -> None:
    plain = last_loss(bench, USUAL)
    assert last_loss(bench, USUAL) == plain
    assert last_loss(bench, USUAL, seed=2) != plain
    changes: list[dict[str, Any]] = [{"variant": name} for name in get_args(Variant) if name != "lora"]
    changes += [{"sigma": 0.5}, {"sigma": 0.5, "draw": "low_rank"}, {"dropout": 0.3}, {"rho": 0.5}]
    changes += [
        {"rho": 0.5, "sam": "weights"},
        {"variant": "full", "sigma": 0.5},
        {"variant": "adalora", "sigma": 0.5},
    ]
    losses = [last_loss(bench, replace(USUAL, **change)) for change in changes]
    assert len({plain, *losses}) == 1 + len(changes)


def test_every_adapter_starts_at_the_pretrained_weights(bench: DotBench) -> None:
    for name in get_args(Variant):
        torch.manual_seed(0)
        model = bench.model().eval()
        before = model(bench.train.images)
        settings = replace(USUAL, variant=name)
        adapter = _adapted(model, bench, settings, seed=0)
        model.eval()
        assert torch.allclose(model(bench.train.images), before, atol=1e-4), name
        ours = sum(one.numel() for one in adapter.parameters)
        assert ours < sum(one.numel() for one in model.parameters()), name


def test_every_adapter_has_the_same_noise_at_its_start_and_loses_it(bench: DotBench) -> None:
    outputs = []
    for variant in ("full", "adalora", "lora"):
        torch.manual_seed(0)
        model = bench.model()
        adapter = adapted(model, bench.targets, replace(USUAL, variant=variant), 0, lambda _: [])
        model.eval()
        before = model(bench.train.images)
        noise = noise_of(adapter, NoiseSettings(0.3, "constant", 1, 0, "filter", "encoder", "full", 1))
        with noise.perturb(0):
            outputs.append(model(bench.train.images))
        noise.detach()
        assert torch.equal(model(bench.train.images), before)
        assert not torch.allclose(outputs[-1], before)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-5)


@pytest.mark.parametrize("variant", ["adalora", "full"])
def test_the_loss_rises_where_no_lora_of_pefts_is_trained_too(bench: DotBench, variant: Variant) -> None:
    seen = run(bench, replace(USUAL, variant=variant), seed=0)
    assert seen["rise"] != 0
    assert set(seen) >= {"validation", "test", "darker", "train"}


def test_adalora_ends_with_its_rank(bench: DotBench) -> None:
    torch.manual_seed(0)
    settings = Settings(lr=1e-2, steps=8, rank=2, variant="adalora")
    model = bench.model()
    adapter = _adapted(model, bench, settings, seed=0)
    _train(adapter, bench.train, settings, seed=0)
    values = [one for name, one in model.named_parameters() if "lora_E" in name]
    assert sum(len(one) for one in values) == 3 * len(values)
    assert sum(int((one != 0).sum()) for one in values) == 2 * len(values)


def test_a_run_is_named_by_what_is_not_as_usual() -> None:
    assert USUAL.named() == {"lr": 1e-3, "steps": 3}
    assert replace(USUAL, sigma=0.1, rank=4).named() == {"lr": 1e-3, "steps": 3, "rank": 4, "sigma": 0.1}


def test_the_trial_with_the_best_validation_is_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quality = {2 * rate: (0.9 if rate == RATES[2] else 0.5) for rate in RATES}

    def made_up(bench: Any, settings: Settings, seed: int, only_validation: bool) -> dict[str, Any]:
        return {"validation": {"accuracy": quality[settings.lr], "loss": 1.0}, "whole_seconds": 0.0}

    monkeypatch.setattr(paper_study, "run", made_up)
    runs, options = Runs(tmp_path / "result.json"), argparse.Namespace(steps=1, trials=TRIALS)
    bench: Any = SimpleNamespace(lr_factor=2.0)
    assert paper_study._tuned(runs, bench, "dots", ARMS["lora"], options).lr == 2 * RATES[2]


def test_all_arms_have_as_many_trials() -> None:
    arms = {**ARMS, **VARIANT_ARMS}
    assert {len(arm.grid) for arm in arms.values()} == {TRIALS}
    settings = [str(Settings(steps=1, **arm.fixed, **choice)) for arm in arms.values() for choice in arm.grid]
    assert len(set(settings)) == len(settings)


def test_a_study_goes_on_where_it_stopped_and_pairs_seeds(
    bench: DotBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: VARIANT_ARMS[name] for name in ("lora-ga", "flat lora-ga")}
    monkeypatch.setattr(paper_study, "VARIANT_ARMS", few)
    result = tmp_path / "result.json"
    arguments = ["--work", str(tmp_path), "--arms", "lora", "flat", "--trials", "1", "--steps", "2", "--seeds", "2"]
    options = parser_of(None, ["dots"], result, steps=2).parse_args([*arguments, "--sweeps", "variants"])
    study(options, lambda name: bench)
    first = json.loads(result.read_text(encoding="utf-8"))
    table = first["tables"]["dots"]
    assert set(table) == {"lora", "flat", *few}
    assert table["flat lora-ga"]["against"] == "lora-ga"
    assert len(table["flat"]["difference"]["test"]["differences"]) == 2
    assert table["lora"]["difference"]["shifted"]["mean"] == 0
    monkeypatch.setattr(paper_study, "run", lambda *_: pytest.fail("a run was done twice"))
    study(options, lambda name: bench)
    assert json.loads(result.read_text(encoding="utf-8"))["tables"] == first["tables"]


def test_surfaces_are_those_of_the_runs_and_drawn_once(
    bench: DotBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_study_surface, "CONFIG", LandscapeConfig(surface_points=3, slice_directions=2))
    pair = {"LoRA": USUAL, "Flat-LoRA": replace(USUAL, sigma=0.5)}
    draw_surfaces(bench, pair, tmp_path)
    found = json.loads((tmp_path / "flatness.json").read_text(encoding="utf-8"))
    for name, settings in pair.items():
        seen = run(bench, settings, paper_study_surface.SEED, only_validation=True)["validation"]["loss"]
        assert found["losses"][name] == pytest.approx(seen, rel=1e-4)
    assert found["runs"]["Flat-LoRA"]["sigma"] == 0.5
    assert (tmp_path / "surface.png").is_file()
    trained: list[Settings] = []

    def stopped(bench: Any, settings: Settings, seed: int) -> Any:
        trained.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(paper_study_surface, "train", stopped)
    draw_surfaces(bench, pair, tmp_path)
    assert not trained, "they were there"
    with pytest.raises(KeyboardInterrupt):
        draw_surfaces(bench, {**pair, "LoRA": replace(USUAL, lr=2e-3)}, tmp_path)
    assert not (tmp_path / "surface.png").exists(), "of other runs"
    with pytest.raises(KeyboardInterrupt):
        draw_surfaces(bench, pair, tmp_path)  # figures without a picture were not finished
    assert [one.lr for one in trained] == [2e-3, USUAL.lr]
