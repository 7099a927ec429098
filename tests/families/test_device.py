"""The state of this process, and how long processes wait for each other."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.families import device
from flatlora_diffusion.training import resolve_config
from flatlora_diffusion.training.resolve_config import with_precision

CUDA = torch.device("cuda")


def test_processes_wait_for_the_first_one_longer_than_pytorch_s_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(device, "PartialState", lambda **settings: asked.update(settings))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    device.this_process()
    assert asked["cpu"] is True
    assert asked["timeout"] >= timedelta(hours=6)


@pytest.fixture
def tesla_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process's device is a T4, which has bf16 by PyTorch's default answer, because PyTorch emulates it."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(resolve_config, "this_process", lambda: SimpleNamespace(device=CUDA))


@pytest.mark.usefixtures("tesla_t4")
@pytest.mark.parametrize("is_launchers", [False, True])
def test_bf16_that_a_gpu_emulates_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, is_launchers: bool
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if is_launchers else "no")
    config = TrainConfig().replace(mixed_precision=None if is_launchers else "bf16")
    with pytest.raises(ConfigError, match=r"mixed_precision='bf16'.*Tesla T4.*--mixed_precision fp16"):
        with_precision(config)


@pytest.mark.usefixtures("tesla_t4")
def test_every_other_precision_and_device_is_accepted() -> None:
    for precision in ("no", "fp16"):
        assert with_precision(TrainConfig().replace(mixed_precision=precision)).optim.mixed_precision == precision
    device.check_precision("mixed_precision", "bf16", torch.device("cpu"))
    assert not device.has_bf16(CUDA)


def test_no_question_for_bf16_counts_its_emulation() -> None:
    for file in Path(device.__file__).parents[1].rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.count("is_bf16_supported(") == text.count("is_bf16_supported(including_emulation=False)"), file
