"""A run on the random klein."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def settings(klein: Path, icons: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(klein),
        "instance_data_dir": str(icons),
        "instance_prompt": "an icon",
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 3,
        "train_batch_size": 2,
        "learning_rate": 0.02,
        "lr_warmup_steps": 0,
        "seed": 0,
        "save_dtype": "fp32",
        "selfcheck": "never",
        "report_to": "none",
        "method": "lora",
    }
