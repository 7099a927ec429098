"""The file for diffusers: a stock pipeline computes the trained function with every adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionXLPipeline
from tiny_runs import output_with, save_lora, trained

from flatlora_diffusion.config import TrainConfig

ADAPTERS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 9},
    "rank stabilized": {"use_rslora": True, "lora_alpha": 8},
    "dora": {"use_dora": True, "lora_alpha": 8},
    "mixed ranks": {"lora_block_ranks": "mid_block=7,up_blocks.0=2"},
    "mixed ranks with alpha": {"lora_block_ranks": "mid_block=7", "lora_alpha": 8},
    "convolutions": {"lora_target_modules": "conv", "lora_block_ranks": "mid_block=2"},
    "text encoders": {"train_text_encoder": True, "lora_alpha": 9},
    "text encoders, rank stabilized": {"train_text_encoder": True, "use_rslora": True},
    "dora and text encoders": {"use_dora": True, "train_text_encoder": True},
}


# tests/training/test_release.py has the others in the files of a run.
SHORT = ("dora and text encoders", "mixed ranks with alpha")


@pytest.mark.parametrize(
    "name", [*SHORT, *(pytest.param(n, marks=pytest.mark.long) for n in ADAPTERS if n not in SHORT)]
)
def test_a_stock_pipeline_computes_the_trained_function(
    config: TrainConfig, base: Path, name: str, tmp_path: Path
) -> None:
    state = trained(config.replace(**ADAPTERS[name], learning_rate=0.1, text_encoder_lr=0.1))
    path = save_lora(state.base.pipeline, tmp_path / "out")
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    plain = output_with(stock, state)
    stock.load_lora_weights(path)
    expected = output_with(state.base.pipeline, state)
    effect = float((expected - plain).abs().max())
    assert effect > 1e-3
    assert float((output_with(stock, state) - expected).abs().max()) < 1e-3 * effect
