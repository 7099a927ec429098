"""What the tabs work with: an app in an empty folder, its runs, and short real runs to show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import SmallDisk, mounted

from app.context import AppContext, make_context
from app.dataset.thumbnails import Thumbnails
from app.runs.runs import RunStore
from app.settings import AppSettings
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.training.trainer import train

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    """To be left empty."""
    with mounted(tmp_path_factory.mktemp("disk")) as disk:
        yield disk


@pytest.fixture
def context(tmp_path: Path) -> AppContext:
    return make_context(AppSettings(runs_dir=str(tmp_path / "runs")))


@pytest.fixture
def thumbnails(tmp_path: Path) -> Thumbnails:
    return Thumbnails(tmp_path / "thumbnails")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStore:
    """Runs whose trainers are started as the app starts them, from the repository, on one thread."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return RunStore(tmp_path / "runs")


@pytest.fixture(scope="session")
def pair(base: Path, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder with a pair of two steps and checkpoints after each; to be copied, not to be changed."""
    runs = tmp_path_factory.mktemp("pair")
    for method in ("lora", "flat-lora"):
        values = {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "max_train_steps": 2,
            "checkpointing_steps": 1,
            "train_batch_size": 1,
            "learning_rate": 0.01,
            "report_to": "none",
            "method": method,
            "output_dir": str(runs / f"icons-{method}"),
        }
        train(TrainConfig.from_dict(values))
    for config in runs.glob("*/config.json"):  # where base and images lie is not saved from a command line
        saved = json.loads(config.read_text(encoding="utf-8"))
        places = {"pretrained_model_name_or_path": str(base), "instance_data_dir": str(icons)}
        config.write_text(json.dumps(saved | places), encoding="utf-8")
    return runs
