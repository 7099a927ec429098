"""The self-check of a run reports errors in its first steps and does not change the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from fp16_on_cpu import init_with_scaler
from safetensors.torch import load_file
from tiny_runs import samples_of, trained

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.commands import doctor
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.families.sdxl.random_base import random_sdxl
from flatlora_diffusion.memory.estimate import GIB, estimate_memory
from flatlora_diffusion.method.draw import FullDraw
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training import selfcheck
from flatlora_diffusion.training.gpu_check import CHECK_RHO_RISE, gpu_check_configs
from flatlora_diffusion.training.micro_batches import micro_batches
from flatlora_diffusion.training.selfcheck import Check, hash_frozen_weights, noise_std, sigma_zero
from flatlora_diffusion.training.state import LossIncrease, prepare
from flatlora_diffusion.training.trainer import train, train_step

WHATS = ["noise_std", "noise_std", "sigma_zero", "base_weights", "loss", "cost"]


def selfcheck_events(path: Path) -> list[dict[str, Any]]:
    return [event for event in RunDir(path.parent).events() if event["event"] == "selfcheck"]


def test_a_run_that_checks_itself_is_the_same_run(config: TrainConfig, tmp_path: Path, caplog: Any) -> None:
    config = config.replace(lora_dropout=0.2, sigma_schedule="cosine")
    plain = train(config.replace(output_dir=str(tmp_path / "plain")))
    assert selfcheck_events(plain) == [], "on a CPU none is due"
    with caplog.at_level("INFO"):
        checked = train(config.replace(selfcheck="always"))
    first, second = load_file(plain), load_file(checked)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    events = selfcheck_events(checked)
    assert [event["what"] for event in events] == WHATS
    assert all(event["is_right"] for event in events), events
    assert events[2]["difference"] == 0, "on a CPU sigma 0 is the plain LoRA bit for bit"
    assert caplog.text.count("self-check, right") == len(WHATS)
    assert str(tmp_path) not in str(events)


@pytest.mark.parametrize(
    "settings",
    [
        {"perturb_draw": "full"},
        pytest.param({"perturb_per": "step"}, marks=pytest.mark.long),
        {"perturb_noise": "iid"},
        {"use_dora": True},
        {"mixed_precision": "bf16", "lora_target_modules": "conv"},
    ],
    ids=str,
)
def test_every_kind_of_noise_has_its_std(config: TrainConfig, settings: dict[str, Any]) -> None:
    state = trained(config.replace(**settings), steps=2)
    flat = state.flats[0]
    for name in (next(iter(flat.layers)), list(flat.layers)[-1]):
        check = noise_std(state, flat, name)
        assert check.is_right, check.message
    assert sigma_zero(state).is_right


def test_a_failed_check_is_logged_and_the_run_continues(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    plain = FullDraw.base_output

    def doubled(self: FullDraw, layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        clean = layer.base_hook.forward(x, *args, **kwargs)
        return clean + 2 * (plain(self, layer, x, *args, **kwargs) - clean)

    monkeypatch.setattr(FullDraw, "base_output", doubled)
    step = selfcheck.SelfCheck.step_done

    def writes_the_base(self: selfcheck.SelfCheck, *args: float) -> None:
        weight = next(parameter for parameter in self._state.base.denoiser.parameters() if not parameter.requires_grad)
        with torch.no_grad():
            weight.add_(1e-3)
        step(self, *args)

    monkeypatch.setattr(selfcheck.SelfCheck, "step_done", writes_the_base)
    path = train(config.replace(selfcheck="always", perturb_draw="full"))
    wrong = {event["what"] for event in selfcheck_events(path) if not event["is_right"]}
    assert wrong == {"noise_std", "base_weights"}
    assert caplog.text.count("self-check, WRONG") == 3


def test_an_error_in_a_check_does_not_end_the_run(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(selfcheck, "hash_frozen_weights", broken)
    events = selfcheck_events(train(config.replace(selfcheck="always", method="lora")))
    assert [event["told"] for event in events[:2]] == ["the check failed: no kernel"] * 2
    assert [event["what"] for event in events] == ["remember", "base", "loss", "cost"]


@pytest.mark.parametrize("passes", [0, 2], ids=["plain", "at sigma 0"])
def test_an_error_in_a_pass_of_the_check_does_not_end_the_run(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    whole, made = selfcheck._loss_and_gradients, []

    def broken(*given: Any) -> Any:
        made.append(given)
        if len(made) > passes:
            raise torch.OutOfMemoryError("no memory")
        return whole(*given)

    monkeypatch.setattr(selfcheck, "_loss_and_gradients", broken)
    path = train(config.replace(selfcheck="always", max_train_steps=1))
    assert [event["told"] for event in selfcheck_events(path) if event["what"] == "sigma_zero"] == [
        "the check failed: no memory"
    ]
    assert "step" in {event["event"] for event in RunDir(path.parent).events()}


def test_the_check_runs_once_per_version_and_device(config: TrainConfig, monkeypatch: Any, tmp_path: Path) -> None:
    begun: list[int] = []
    gpu = torch.device("cuda")
    monkeypatch.setattr(selfcheck, "cached_assets_path", lambda *_, **__: tmp_path)
    monkeypatch.setattr(selfcheck, "_device_name", lambda _: "GPU 1/2")
    monkeypatch.setattr(selfcheck.SelfCheck, "begin", lambda _: begun.append(1))
    state = prepare(config, samples_of(config))
    assert selfcheck.begin_self_check(state) is None
    monkeypatch.setattr(type(state.accelerator), "device", gpu)
    assert selfcheck.begin_self_check(state) is not None
    selfcheck._remember_as_passed(gpu)
    assert selfcheck.begin_self_check(state) is None
    monkeypatch.setattr(selfcheck, "__version__", "999")
    assert selfcheck.begin_self_check(state) is not None
    assert len(begun) == 2


def test_one_changed_bit_of_a_frozen_weight_is_detected(config: TrainConfig) -> None:
    unet = prepare(config, samples_of(config)).base.denoiser
    before = hash_frozen_weights([unet])
    weight = next(parameter for parameter in unet.parameters() if not parameter.requires_grad).data
    weight.view(torch.int32).flatten()[3] ^= 1
    assert hash_frozen_weights([unet]) != before


@pytest.fixture
def tiny_drill(base: Path) -> TrainConfig:
    return TrainConfig().replace(
        pretrained_model_name_or_path=str(base), resolution=32, train_batch_size=1, gradient_checkpointing=True
    )


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_the_doctor_trains_on_random_weights(
    tiny_drill: TrainConfig, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(Accelerator, "__init__", init_with_scaler)
    findings = list(doctor.gpu_check_findings(tiny_drill.replace(mixed_precision=precision)))
    assert [finding.level for finding in findings] == ["ok"] * len(WHATS), findings
    assert "s for a step" in findings[-1].fact


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_the_doctor_checks_that_sam_raises_the_loss(
    tiny_drill: TrainConfig, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(Accelerator, "__init__", init_with_scaler)
    findings = list(
        doctor.gpu_check_findings(tiny_drill.replace(method="sam", rho_rise=CHECK_RHO_RISE, mixed_precision=precision))
    )
    assert [finding.level for finding in findings] == ["ok"] * 4, findings
    assert "to first order" in findings[0].fact


@pytest.mark.parametrize(("name", "level"), [("base_weights", "problem"), ("cost", "note"), ("rise", "note")])
def test_only_a_check_whose_failure_makes_trainings_wrong_is_a_problem(
    tiny_drill: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str, level: str
) -> None:
    checks = [Check(name, False, "seen"), Check(name, True, "seen")]
    monkeypatch.setattr("flatlora_diffusion.training.gpu_check.run_gpu_check", lambda config: checks)
    failed, passed = doctor.gpu_check_findings(tiny_drill)
    assert (failed.level, passed.level) == (level, "ok")
    assert "report" in failed.remedy


@pytest.mark.long
def test_the_doctor_tries_both_methods_with_valid_settings() -> None:
    flat, sam = gpu_check_configs()
    assert (flat.perturb.method, sam.perturb.method) == ("flat-lora", "sam")
    assert sam.perturb.target_loss_increase == CHECK_RHO_RISE
    for config in (flat, sam):
        assert estimate_memory(config).total < 0.9 * 12 * GIB, "the smallest GPU that trains without --offload"


@pytest.mark.parametrize("method", ["sam", pytest.param("lora-sam", marks=pytest.mark.long)])
@pytest.mark.parametrize(("precision", "rho", "is_right"), [("no", 1e-3, True), ("bf16", 1e-5, False)])
def test_an_ascent_lost_to_half_precision_is_logged_in_each_run(
    config: TrainConfig, caplog: Any, method: str, precision: str, rho: float, is_right: bool
) -> None:
    """On the tiny base, which is sensitive to rho; this check runs on a CPU too."""
    path = train(
        config.replace(
            pretrained_model_name_or_path="tiny", resolution=64, method=method, mixed_precision=precision, rho=rho
        )
    )
    (check,) = selfcheck_events(path)
    assert (check["what"], check["is_right"]) == ("rise", is_right)
    assert ("give a larger --rho" in caplog.text) is not is_right
    assert "please report" not in caplog.text
    rises = [event["rise"] for event in RunDir(path.parent).events() if event["event"] == "step"]
    assert sum(rises) / 3 == pytest.approx(check["found"])


def test_the_first_three_ascents_are_checked(config: TrainConfig) -> None:
    """Steps that fp16's scaler skips have none."""
    state = prepare(config.replace(method="sam", max_train_steps=9), samples_of(config))
    state.run.folder.mkdir(parents=True)
    check = selfcheck.SelfCheck(state, is_complete=False)
    for rise in (
        None,
        LossIncrease(0.2, 0.1),
        None,
        LossIncrease(0.2, 0.1),
        LossIncrease(0.2, 0.1),
        LossIncrease(0.0, 0.1),
    ):
        state.progress.loss_increase = rise
        check.step_done(1.0, 1.0)
    assert [(item.name, item.is_right) for item in check.checks] == [("rise", True)]


def test_a_step_logs_the_rise_of_its_ascent(config: TrainConfig) -> None:
    """Compared with the loss at weights moved by hand, and with the norm of their gradient."""
    config = config.replace(method="sam", rho=0.05)
    state = prepare(config, samples_of(config))
    weights = [layer.get_base_layer().weight for layer in lora_layers(state.model).values()]
    (drawn,) = micro_batches(state, 0, DrawHash())
    clean = drawn.loss()
    for weight in weights:
        weight.requires_grad_(True)
    slopes = torch.autograd.grad(drawn.loss(), weights)
    length = torch.stack([slope.norm() for slope in slopes]).norm()
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight.requires_grad_(False).add_(slope, alpha=float(0.05 / length))
        above = drawn.loss()
        for weight, slope in zip(weights, slopes, strict=True):
            weight.sub_(slope, alpha=float(0.05 / length))
    train_step(state, 0)
    assert state.progress.loss_increase is not None
    assert state.progress.loss_increase.measured == pytest.approx(float(above / clean) - 1, rel=1e-2)
    assert state.progress.loss_increase.expected == pytest.approx(float(0.05 * length / clean), rel=1e-3)


def test_methods_without_ascent_log_no_rise(config: TrainConfig) -> None:
    state = trained(config.replace(method="bi-lora"), steps=1)
    assert state.progress.loss_increase is None


def test_random_weights_have_the_shapes_of_the_base(tiny_drill: TrainConfig, sdxl: Any) -> None:
    other = random_sdxl(tiny_drill.model, torch.device("cpu"), torch.float32)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(base.pipeline, part).state_dict() for base in (other, sdxl))
        assert {name: value.shape for name, value in ours.items()} == {n: v.shape for n, v in theirs.items()}
        assert all(value.isfinite().all() for value in ours.values())
