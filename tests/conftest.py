"""Test-wide settings: one thread, no network, no analytics; and the tiny random pipeline that many tests train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Read at import time by their libraries, so they are set before any of them is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from playwright.sync_api import Browser

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved SDXL pipeline of random weights, 32-pixel images."""
    from tiny_random_sdxl import save_tiny_random_sdxl

    return save_tiny_random_sdxl(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three captioned pictures."""
    from tiny_random_sdxl import save_icons

    return save_icons(tmp_path_factory.mktemp("data") / "icons")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One browser for all tests: Playwright starts once in a thread."""
    from benchmarks.app_driver import BROWSERS, browser_path, open_browser

    path = browser_path()
    if path is None:
        reason = f"no browser is installed: none of {', '.join(BROWSERS)} is on the PATH"
        if os.environ.get("FLATLORA_REQUIRE_BROWSER") == "1":
            pytest.fail(f"{reason}, and FLATLORA_REQUIRE_BROWSER=1 wants one")
        print(reason)
        pytest.skip(reason)
    with open_browser(path) as browser:
        yield browser


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one precision per process; each test may choose its own."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
