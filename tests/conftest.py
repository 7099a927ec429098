"""Test-wide settings: one thread, no network, no analytics; and the tiny random pipeline that many tests train."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read at import time by their libraries, so they are set before any of them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start: those of two workers share the cores

import pytest
import torch
from playwright.sync_api import Browser

if TYPE_CHECKING:
    from flatlora_diffusion.config import TrainConfig
    from flatlora_diffusion.families.sdxl.pipeline import Sdxl

DURATIONS = Path(__file__).with_name(".durations.json")

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run, and not in the process that only hands them out, what they start is a plain installation."""
    if "PYTEST_XDIST_WORKER" in os.environ or not config.getoption("numprocesses", None):
        before = os.environ.get("PYTHONPATH")
        plain = str(Path(__file__).with_name("plain_start"))
        os.environ["PYTHONPATH"] = plain if before is None else os.pathsep.join([plain, before])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, so that at the end no process waits for the long file of another.

    A file that `make durations` has not measured yet comes after the others.
    """
    seconds: dict[str, float] = json.loads(DURATIONS.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], 0.0))


def pytest_collection_finish() -> None:
    """All that is imported by now stays, so no search for garbage needs to look at it: each training ends with one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SDXL pipeline of random weights, 32-pixel images."""
    from tiny_random_sdxl import save_tiny_random_sdxl

    return save_tiny_random_sdxl(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved FLUX.2 klein pipeline of random weights, 32-pixel images."""
    from tiny_random_klein import save_tiny_random_klein

    return save_tiny_random_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(scope="session")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three captioned pictures."""
    from tiny_random_sdxl import save_icons

    return save_icons(tmp_path_factory.mktemp("data") / "icons")


@pytest.fixture(scope="session")
def lora(base: Path, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of `base` that was trained far enough to change it."""
    from flatlora_diffusion.config import TrainConfig
    from flatlora_diffusion.training.trainer import train

    return train(
        TrainConfig.from_dict(
            {
                "pretrained_model_name_or_path": str(base),
                "instance_data_dir": str(icons),
                "instance_prompt": "an icon",
                "output_dir": str(tmp_path_factory.mktemp("lora") / "run"),
                "max_train_steps": 3,
                "learning_rate": 0.05,
                "resolution": 32,
                "seed": 0,
                "save_dtype": "fp32",
                "report_to": "none",
            }
        )
    )


@pytest.fixture
def sdxl(base: Path) -> Sdxl:
    """`base`, loaded in fp32 without a LoRA."""
    from flatlora_diffusion.config import ModelConfig
    from flatlora_diffusion.families.sdxl.pipeline import load_sdxl

    return load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), torch.float32)


@pytest.fixture
def config(base: Path, icons: Path, tmp_path: Path, short_drawings: None) -> TrainConfig:
    """A run of three steps on `icons`."""
    from flatlora_diffusion.config import TrainConfig

    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "output_dir": str(tmp_path / "run"),
            "max_train_steps": 3,
            "train_batch_size": 2,
            "learning_rate": 1e-2,
            "text_encoder_lr": 1e-2,
            "sigma_schedule": "constant",
            "report_to": "none",
            "seed": 3,
        }
    )


@pytest.fixture
def short_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of SDXL take 2 steps in place of 25, unless a test asks for another number."""
    monkeypatch.setattr("flatlora_diffusion.families.sdxl.family.SdxlFamily.steps", 2)


@pytest.fixture
def without_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare` trains in this process."""
    from in_this_process import InThisProcess

    monkeypatch.setattr("flatlora_diffusion.compare.arms.subprocess.Popen", InThisProcess)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests: Playwright starts once in a thread."""
    from app_driver import BROWSERS, browser_path, open_browser

    path = browser_path()
    if path is None:
        reason = f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH"
        if os.environ.get("FLATLORA_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason}, and FLATLORA_REQUIRE_BROWSER=1 wants one")
        print(reason)
        pytest.skip(reason)
    with open_browser(path) as browser:
        yield browser


@pytest.fixture(params=["full", "low_rank"])
def draw(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each kind of draw in turn, as the one that a `FlatLora` has unless it is told another."""
    from flatlora_diffusion.method.noise_config import NoiseConfig

    init: Any = NoiseConfig.__init__
    monkeypatch.setattr(init, "__defaults__", tuple({"low_rank": request.param}.get(x, x) for x in init.__defaults__))
    kind: str = request.param
    return kind


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one precision per process; each test may choose its own."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
