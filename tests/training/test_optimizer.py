"""Effect and resumption of optimizers, learning rates and averaged weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import load_file
from tiny_runs import samples_of

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.training.optimizer import build_optimizer
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train, train_step


@pytest.mark.parametrize(
    "name", ["adafactor", *(pytest.param(name, marks=pytest.mark.long) for name in ("prodigy", "8bit"))]
)
def test_optimizers_lower_the_loss_and_resume_exactly(config: TrainConfig, name: str) -> None:
    package = {"prodigy": "prodigyopt", "8bit": "bitsandbytes"}.get(name)
    if package:
        pytest.importorskip(package)
    settings: dict[str, Any] = {"use_8bit_adam": True} if name == "8bit" else {"optimizer": name}
    if name == "prodigy":
        settings["learning_rate"] = 1.0
    chosen = config.replace(**settings, max_train_steps=4, checkpointing_steps=2, train_text_encoder=True)
    first = prepare(chosen.replace(max_train_steps=12), samples_of(config))
    losses = [train_step(first, 0) for _ in range(12)]
    assert losses[-1] < losses[0]
    whole = load_file(train(chosen))
    resumed = load_file(train(chosen.replace(resume_from_checkpoint="checkpoint-2")))
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_optional_optimizers_name_their_package(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatlora_diffusion.training.optimizer.importlib.util.find_spec", lambda name: None)
    for settings, package in (({"optimizer": "prodigy"}, "prodigyopt"), ({"use_8bit_adam": True}, "bitsandbytes")):
        with pytest.raises(ConfigError, match=f"needs the package {package}: pip install {package}"):
            prepare(config.replace(**settings), samples_of(config))


def test_scale_lr_multiplies_by_the_images_of_a_step(config: TrainConfig) -> None:
    state = prepare(config.replace(scale_lr=True, gradient_accumulation_steps=3), samples_of(config))
    assert state.lr_schedule.get_last_lr() == [pytest.approx(1e-2 * 3 * 2)]


def test_text_encoders_have_their_own_learning_rate_and_decay(config: TrainConfig) -> None:
    state = prepare(config.replace(train_text_encoder=True, text_encoder_lr=2e-3), samples_of(config))
    unet, text = state.optimizer.param_groups
    assert (unet["lr"], unet["weight_decay"]) == (1e-2, 1e-4)
    assert (text["lr"], text["weight_decay"]) == (2e-3, 1e-3)


def test_a_warm_up_longer_than_the_run_is_reported(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    warming = config.replace(lr_scheduler="cosine", max_train_steps=11)
    for settings in ({"lr_warmup_steps": 10}, {"lr_scheduler": "constant", "lr_warmup_steps": 500}):
        prepare(warming.replace(**settings), samples_of(config))
    assert "lr_warmup_steps" not in caplog.text
    prepare(warming.replace(lr_warmup_steps=20), samples_of(config))
    assert re.search("lr_warmup_steps=20 .* 11 .* 50 %", caplog.text)


def test_the_saved_weights_are_the_ema(config: TrainConfig, tmp_path: Path) -> None:
    settings = config.replace(use_ema=True, ema_decay=0.5, max_train_steps=4, checkpointing_steps=2)
    plain = train(config.replace(max_train_steps=4, output_dir=str(tmp_path / "plain")))
    averaged = train(settings.replace(output_dir=str(tmp_path / "averaged")))
    first, second = load_file(plain), load_file(averaged)
    assert any(not torch.equal(first[key], second[key]) for key in first)
    norms = [sum(float(v.square().sum()) for k, v in state.items() if "lora_B" in k) for state in (first, second)]
    assert 0 < norms[1] < norms[0]
    train(settings.replace(output_dir=str(tmp_path / "averaged"), resume_from_checkpoint="checkpoint-2"))
    assert all(torch.equal(value, second[key]) for key, value in load_file(averaged).items())


@pytest.mark.parametrize(("precision", "fused"), [("no", True), ("bf16", True), ("fp16", None)])
def test_adamw_is_one_kernel_unless_a_scaler_would_have_it_skip_steps(
    config: TrainConfig, precision: str, fused: bool | None
) -> None:
    settings = config.replace(mixed_precision=precision, max_train_steps=10)
    optimizer, _ = build_optimizer(
        settings, {"unet.q.lora_A.default.weight": torch.nn.Parameter(torch.zeros(1))}, [], 1
    )
    assert [group["fused"] for group in optimizer.param_groups] == [fused]


def test_lora_plus_multiplies_the_learning_rate_of_each_b(config: TrainConfig) -> None:
    trainable = {
        f"{part}.q.lora_{side}.default.weight": torch.nn.Parameter(torch.zeros(1))
        for part in ("unet", "text_encoder")
        for side in ("A", "B")
    }
    settings = config.replace(lora_plus_ratio=16.0, learning_rate=0.01, text_encoder_lr=0.001, max_train_steps=10)
    optimizer, schedule = build_optimizer(settings, trainable, [], processes=1)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    learning_rates = [rates[id(parameter)] for parameter in trainable.values()]
    assert learning_rates == pytest.approx([0.01, 0.16, 0.001, 0.016])
    assert schedule.get_last_lr()[0] == pytest.approx(0.01)


def test_lora_plus_has_the_learning_rates_that_peft_gives(config: TrainConfig) -> None:
    settings = config.replace(lora_plus_ratio=16.0, lora_target_modules="conv")
    state = prepare(settings, samples_of(config))
    unet = state.base.denoiser
    theirs = create_loraplus_optimizer(unet, torch.optim.AdamW, lr=settings.optim.learning_rate, loraplus_lr_ratio=16)
    rates, expected = (
        {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        for optimizer in (state.optimizer, theirs)
    )
    assert rates == pytest.approx(expected)
    assert len(set(rates.values())) == 2
    assert len(rates) == sum(parameter.requires_grad for parameter in unet.parameters())


OWN = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
OF_PRODIGY = {
    "prodigy_beta3": 0.7,
    "prodigy_decouple": False,
    "prodigy_use_bias_correction": False,
    "prodigy_safeguard_warmup": False,
}


def optimizer_with(config: TrainConfig, **settings: Any) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer of a run of 4 steps with a weight of each part, and its schedule."""
    trainable = {name: torch.nn.Parameter(torch.zeros(1)) for name in ("unet.q.lora_A.default.weight", "text.q")}
    return build_optimizer(config.replace(**{"max_train_steps": 4, **settings}), trainable, [], 1)


@pytest.mark.parametrize(
    ("package", "settings", "expected"),
    [
        (None, {"optimizer": "adamw"}, {}),
        (None, {"optimizer": "lora-pro"}, {}),
        ("bitsandbytes", {"use_8bit_adam": True}, {}),
        (
            "prodigyopt",
            {"optimizer": "prodigy", **OF_PRODIGY},
            {"beta3": 0.7, "decouple": False, "use_bias_correction": False, "safeguard_warmup": False},
        ),
    ],
    ids=["adamw", "lora-pro", "8bit", "prodigy"],
)
def test_the_constants_of_the_settings_are_those_of_the_optimizer(
    config: TrainConfig, package: str | None, settings: dict[str, Any], expected: dict[str, Any]
) -> None:
    if package is not None:
        pytest.importorskip(package)
    optimizer, _ = optimizer_with(config, **OWN, **settings)
    for group in optimizer.param_groups:
        assert (*group["betas"], group["eps"]) == (0.8, 0.95, 1e-5)
        assert {name: group[name] for name in expected} == expected


def factors(config: TrainConfig, **settings: Any) -> list[float]:
    """The factor of the UNet's learning rate in each step."""
    settings = {"lr_warmup_steps": 0, "max_train_steps": 8, **settings}
    (of_unet, _) = optimizer_with(config, **settings)[1].lr_lambdas
    return [of_unet(step) for step in range(8)]


def test_the_power_and_the_restarts_of_the_settings_are_those_of_the_schedule(config: TrainConfig) -> None:
    first, second = (factors(config, lr_scheduler="polynomial", lr_power=power) for power in (1.0, 2.0))
    assert first == pytest.approx([1 - step / 8 for step in range(8)], rel=1e-3)
    assert second == pytest.approx([(1 - step / 8) ** 2 for step in range(8)], abs=1e-3)
    begun = factors(config, lr_scheduler="cosine_with_restarts", lr_num_cycles=2)
    assert begun[:4] == pytest.approx(begun[4:])
    assert begun[4] == 1 > begun[3] > 0


def test_text_encoders_are_trained_for_their_share_of_the_steps(config: TrainConfig) -> None:
    schedule = optimizer_with(config, train_text_encoder_frac=0.5, train_text_encoder=True)[1]
    trained = [[factor(step) > 0 for step in range(4)] for factor in schedule.lr_lambdas]
    assert trained == [[True] * 4, [True, True, False, False]]
