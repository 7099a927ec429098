"""Every method and adapter: trained on the tiny base, saved, and loaded in a stock pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_runs import output_with, samples_of

from flatlora_diffusion.adapter.full import save_merged
from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.config import ADAPTERS, METHODS, TrainConfig, settings_with
from flatlora_diffusion.storage.run_dir import LORA_FILE
from flatlora_diffusion.training.checkpoint import load_state, save_state, start_run
from flatlora_diffusion.training.export_lora import save_lora
from flatlora_diffusion.training.first_gradients import start_from_gradients
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

# The first six have each method and each adapter at least once, the others are further pairs.
CELLS: dict[str, dict[str, Any]] = {
    "lora pissa exact, text": {
        "method": "lora",
        "adapter": "pissa",
        "pissa_iterations": 0,
        "train_text_encoder": True,
        "lora_alpha": 3,
        "lora_block_ranks": "mid_block=2",
    },
    "sam dora, text": {
        "method": "sam",
        "use_dora": True,
        "train_text_encoder": True,
        "mixed_precision": "bf16",
        "base_dtype": "fp32",
    },
    "bi-lora lora-ga lora-pro": {
        "method": "bi-lora",
        "adapter": "lora-ga",
        "optimizer": "lora-pro",
        "gradient_accumulation_steps": 2,
    },
    "nbar dora adafactor": {"method": "nbar", "use_dora": True, "bar_strength": 4.0, "optimizer": "adafactor"},
    "lora-sam adalora": {"method": "lora-sam", "adapter": "adalora", "gradient_accumulation_steps": 2},
    "flat-lora full": {"method": "flat-lora", "adapter": "full", "rank": 64, "use_ema": True},
    "flat-lora rslora": {"method": "flat-lora", "use_rslora": True, "lora_alpha": 8},
    "flat-lora dora": {"method": "flat-lora", "use_dora": True},
    "flat-lora pissa": {"method": "flat-lora", "adapter": "pissa", "perturb_draw": "low_rank"},
    "lora-sam pissa bf16": {
        "method": "lora-sam",
        "adapter": "pissa",
        "use_rslora": True,
        "mixed_precision": "bf16",
        "base_dtype": "fp32",
    },
    "sam conv": {
        "method": "sam",
        "lora_target_modules": "conv",
        "gradient_accumulation_steps": 2,
        "train_batch_size": 1,
    },
    "bi-lora conv": {"method": "bi-lora", "lora_target_modules": "conv", "gradient_accumulation_steps": 2},
    "flat-lora lora-ga, text, averaged": {
        "method": "flat-lora",
        "adapter": "lora-ga",
        "lora_ga_steps": 2,
        "gradient_accumulation_steps": 2,
        "train_text_encoder": True,
        "use_ema": True,
    },
    "flat-lora lora-pro, text": {
        "method": "flat-lora",
        "optimizer": "lora-pro",
        "train_text_encoder": True,
        "lora_target_modules": "conv",
        "use_ema": True,
    },
    "flat-lora dora lora-pro": {"method": "flat-lora", "use_dora": True, "optimizer": "lora-pro"},
    "sam full": {
        "method": "sam",
        "adapter": "full",
        "rank": 64,
        "perturb_draw": "low_rank",
        "gradient_checkpointing": True,
    },
    "flat-lora adalora": {
        "method": "flat-lora",
        "adapter": "adalora",
        "lora_alpha": 6.0,
        "perturb_draw": "low_rank",
    },
    "sam adalora": {"method": "sam", "adapter": "adalora", "gradient_checkpointing": True},
    "lora+": {"method": "flat-lora", "sigma": 0.5, "lora_plus_ratio": 4.0},
    "nbar pissa, text": {
        "method": "nbar",
        "adapter": "pissa",
        "gradient_accumulation_steps": 2,
        "train_text_encoder": True,
    },
    "bi-lora pissa": {"method": "bi-lora", "adapter": "pissa", "gradient_checkpointing": True},
    "bi-lora dora": {"method": "bi-lora", "use_dora": True},
    "bi-lora adalora": {"method": "bi-lora", "adapter": "adalora", "gradient_accumulation_steps": 2},
    "sam pissa lora+": {"method": "sam", "adapter": "pissa", "lora_plus_ratio": 4.0, "use_ema": True},
    "sam lora-ga lora-pro": {"method": "sam", "adapter": "lora-ga", "lora_ga_steps": 2, "optimizer": "lora-pro"},
    "lora-sam rslora conv": {
        "method": "lora-sam",
        "use_rslora": True,
        "lora_alpha": 8,
        "lora_target_modules": "conv",
    },
}


def changed(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    return config.replace(**settings, learning_rate=0.05, text_encoder_lr=0.05, save_dtype="fp32")


@pytest.fixture(scope="module")
def short(base: Path, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "output_dir": str(tmp_path_factory.mktemp("run")),
            "max_train_steps": 2,
            "train_batch_size": 2,
            "sigma_schedule": "constant",
            "report_to": "none",
            "seed": 0,
            "lr_warmup_steps": 0,
        }
    )


def two_steps(config: TrainConfig) -> tuple[TrainState, list[str]]:
    """A run as the trainer starts it, and the hash of each step's draws."""
    state, draws = prepare(config, samples_of(config)), []
    start_from_gradients(state)
    start_run(state)
    for step in range(2):
        train_step(state, step)
        draws.append(state.progress.draws)
    return state, draws


@pytest.fixture(scope="module")
def plain_draws(short: TrainConfig) -> Callable[..., list[str]]:
    """The draws of plain LoRA with these settings."""

    @functools.cache
    def drawn(**settings: Any) -> list[str]:
        return two_steps(changed(short, {"method": "lora", **settings}))[1]

    return drawn


def cells() -> Iterator[Any]:
    """All cells; those without a method, adapter or optimizer that is new are long."""
    seen: set[tuple[str, Any]] = set()
    for name, cell in CELLS.items():
        values = {(key, cell.get(key)) for key in ("method", "adapter", "optimizer")}
        yield pytest.param(name, marks=[] if values - seen else pytest.mark.long)
        seen |= values


@pytest.fixture(scope="module", params=cells())
def run(request: Any, short: TrainConfig, plain_draws: Callable[..., list[str]]) -> TrainState:
    """Two steps of each method draw the same as plain LoRA, so that comparisons are paired."""
    cell = CELLS[request.param]
    state, draws = two_steps(changed(short, cell))
    alike = {*settings_with("affects", "draws"), "mixed_precision", "base_dtype"}
    assert draws == plain_draws(**{name: value for name, value in cell.items() if name in alike})
    return state


def test_every_method_and_adapter_is_covered() -> None:
    assert {cell["method"] for cell in CELLS.values()} == set(METHODS)
    assert {cell.get("adapter", "lora") for cell in CELLS.values()} == set(ADAPTERS)


def test_a_stock_pipeline_on_the_original_base_computes_what_was_trained(
    run: TrainState, base: Path, tmp_path: Path
) -> None:
    save_lora(run, tmp_path, 2)
    stock = StableDiffusionXLPipeline.from_pretrained(base)
    plain = output_with(stock, run)
    stock.load_lora_weights(tmp_path / LORA_FILE)
    pipeline = run.base.pipeline.to(torch.float32)
    expected = output_with(pipeline, run)
    effect = float((expected - plain).abs().max())
    assert effect > 1e-3
    rounding = 1e-3 if run.config.optim.mixed_precision == "no" else 0.05
    assert float((output_with(stock, run) - expected).abs().max()) < rounding * effect


@pytest.mark.parametrize("run", ["flat-lora full", pytest.param("sam full", marks=pytest.mark.long)], indirect=True)
def test_full_fine_tuning_leaves_a_pipeline_that_computes_what_was_trained(run: TrainState, tmp_path: Path) -> None:
    save_merged(run.base.pipeline, tmp_path)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(output_with(stock, run), output_with(run.base.pipeline, run), rtol=1e-4, atol=1e-4)


def test_the_base_is_never_written(run: TrainState, base: Path) -> None:
    of_file = StableDiffusionXLPipeline.from_pretrained(base).unet.to(run.base.denoiser.dtype)
    modules = dict(of_file.named_modules())
    for name, layer in lora_layers(run.base.denoiser).items():
        assert torch.equal(layer.get_base_layer().weight, modules[name].weight), name


def test_a_checkpoint_resumes_bit_for_bit(run: TrainState, tmp_path: Path) -> None:
    save_state(run, tmp_path, 2)
    other = prepare(run.config, samples_of(run.config))
    assert load_state(other, tmp_path) == 2
    for state in (run, other):
        train_step(state, 2)
    assert run.progress.draws == other.progress.draws
    for name, parameter in run.trainable.items():
        assert torch.equal(parameter, other.trainable[name]), name
