"""The state of this process, and how long processes wait for each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from flatlora_diffusion.sdxl import device


def test_processes_wait_for_the_first_one_longer_than_pytorch_s_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr(device, "PartialState", lambda **settings: asked.update(settings))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    device.this_process()
    assert asked["cpu"] is True
    assert asked["timeout"] >= timedelta(hours=6)
