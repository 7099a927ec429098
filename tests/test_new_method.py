"""A new method is a file and a row of `METHODS`: everything else finds it there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.commands.train_flags import parse_training
from flatlora_diffusion.compare.arms import parse_arm, plan_runs
from flatlora_diffusion.compare.timing import training_seconds
from flatlora_diffusion.config import METHODS, ConfigError, TrainConfig
from flatlora_diffusion.config.methods import MethodSpec
from flatlora_diffusion.memory.estimate import estimate_memory
from flatlora_diffusion.training.trainer import train

ROOT = Path(__file__).parents[1]
TOY = MethodSpec(
    title="Toy",
    help="toy takes half the gradient",
    hint="learns half as fast, which only a test would want",
    build="toy_method:half",
    defaults={"rho": 0.7},
    passes=10.0,
    bytes_per_weight=100,
    excludes=("full",),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "toy", TOY)


def test_it_trains(config: TrainConfig, tmp_path: Path) -> None:
    plain, half = (
        load_file(train(config.replace(method=method, output_dir=str(tmp_path / method), sigma=None)))
        for method in ("lora", "toy")
    )
    assert any(not (plain[name] == half[name]).all() for name in plain)


def test_the_command_line_knows_it_and_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse_training(["--method", "Toy"])[0].perturb.effective_rho == 0.7
    with pytest.raises(ConfigError, match=r"--method toy has no sigma"):
        parse_training(["--method", "toy", "--sigma", "0.1"])
    with pytest.raises(ConfigError, match=r"--method toy .*--adapter full"):
        parse_training(["--method", "toy", "--adapter", "full"])
    with pytest.raises(SystemExit):
        main(["train", "--help-all"])
    assert TOY.help in " ".join(capsys.readouterr().out.split())


def test_the_estimate_of_memory_counts_what_it_holds(config: TrainConfig) -> None:
    plain, toy = (estimate_memory(config.replace(method=method, sigma=None)) for method in ("lora", "toy"))
    assert toy.perturbation - plain.perturbation == 100 * plain.lora // 4


def test_a_comparison_has_it_as_an_arm(config: TrainConfig) -> None:
    arms = [parse_arm(text) for text in ("lora", "toy", "toy:rho=0.1")]
    assert [arm.name for arm in arms] == ["LoRA", "Toy", "Toy, rho 0.1"]
    runs = plan_runs(config.replace(sigma=None), arms, [0], 1)
    plain, toy, _ = (training_seconds([run], runs, pass_seconds=1.0) for run in runs)
    assert toy > plain


def test_the_form_offers_it() -> None:
    from app.train.tab import method_choices

    assert "Toy" in [value for _, value in method_choices()]


def test_the_page_of_settings_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    monkeypatch.delitem(sys.modules, "pages", raising=False)
    import pages

    assert TOY.help in pages.settings_page()
