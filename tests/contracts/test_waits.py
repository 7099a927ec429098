"""A training step waits for the device once for its log, and within its passes only where a number decides."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from tiny_runs import samples_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import flatlora_diffusion
from flatlora_diffusion.config import TrainConfig, for_method
from flatlora_diffusion.data import latents
from flatlora_diffusion.families.sdxl.random_base import random_sdxl
from flatlora_diffusion.training import micro_batches
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

META = torch.device("meta")
PACKAGE = str(Path(flatlora_diffusion.__file__).parent)
ITEM, COPY, COPY_INTO = torch.ops.aten._local_scalar_dense, torch.ops.aten._to_copy, torch.ops.aten.copy_

AdamW = torch.optim.AdamW


class AnyDevice(torch.Generator):
    """A generator for any device; `meta` reads none of its numbers."""

    device: Any = property(lambda generator: generator.made_for)

    def __new__(cls, device: Any = "cpu") -> Any:
        make: Any = super().__new__
        generator = make(cls, device="cpu")
        generator.made_for = torch.device(device)
        return generator


class ReadableMeta(TorchDispatchMode):
    """`meta` in the place of a GPU: each number that is read from it is 1.

    `waits` has a module of the package for each copy to or from the device while operators are queued: PyTorch's
    copies of memory that is not pinned wait for the device in both directions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._is_busy = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet is ITEM and args[0].is_meta:
            self._wait()
            return 1.0
        if packet is COPY and args[0].is_meta and torch.device(kwargs.get("device") or META) != META:
            self._wait()
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        output = func(*args, **kwargs)
        made = [tensor for tensor in tree_leaves(output) if isinstance(tensor, Tensor) and tensor.is_meta]
        has_double = any(tensor.dtype is torch.float64 and tensor.ndim for tensor in made)  # the scaler has a number
        assert not has_double, "some devices have no float64"
        given = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        is_copy = packet in (COPY, COPY_INTO) and any(not tensor.is_meta for tensor in given)
        if made and is_copy:
            self._wait()
        elif made and not func.is_view:
            self._is_busy = True
        return output

    def _wait(self) -> None:
        if self._is_busy:
            self.waits.append(_caller())
        self._is_busy = False


class OwnGenerators(TorchFunctionMode):
    """Refuses operators that fill a tensor from a generator of another device, which `meta` lets pass."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        generator = (kwargs or {}).get("generator")
        if isinstance(generator, AnyDevice):
            assert output.device == generator.device, f"{func.__name__} has a generator of another device"
            self.draws += 1
        return output


def _caller() -> str:
    frame: Any = sys._getframe(2)
    while not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return Path(frame.f_code.co_filename).stem


@pytest.fixture
def waits_of(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The waits of a run's second step, and its forward passes among them."""

    def measure(scaler: torch.amp.GradScaler | None = None, **settings: Any) -> list[str]:
        changed = config.replace(
            **{**for_method(settings["method"]), "cache_latents": True, "lora_target_modules": "to_q", **settings}
        )
        with ReadableMeta() as device, OwnGenerators() as generators:
            state = prepare(changed, samples_of(changed), load=lambda model, _, dtype: random_sdxl(model, META, dtype))
            if scaler is not None:
                state = with_scaler(state, scaler, monkeypatch)
            state.model.register_forward_pre_hook(lambda *_: device.waits.append("forward"))
            train_step(state, 0)  # copies the noise schedule to the device
            device.waits.clear()
            train_step(state, 1)
        assert generators.draws >= 6, "latents, noise and timesteps of each step"
        return device.waits

    monkeypatch.setattr(torch, "Generator", AnyDevice)
    monkeypatch.setattr(accelerate.Accelerator, "device", META)
    monkeypatch.setattr(latents, "check_latents", lambda *_: None)
    # `meta` has no fused one.
    monkeypatch.setattr(torch.optim, "AdamW", lambda sets, fused=None, **options: AdamW(sets, **options))
    return measure


def with_scaler(state: TrainState, scaler: torch.amp.GradScaler, monkeypatch: pytest.MonkeyPatch) -> TrainState:
    """The state with a scaler, as accelerate sets it up for fp16 on a GPU."""
    accelerator, optimizer = state.accelerator, AcceleratedOptimizer(state.optimizer.optimizer, scaler=scaler)
    accelerator.scaler, accelerator.native_amp, accelerator._optimizers = scaler, True, [optimizer]
    monkeypatch.setattr(accelerate.Accelerator, "mixed_precision", "fp16")
    return replace(state, optimizer=optimizer)


BATCH = ["latents", "prompts"]  # for the update of the step before, and for the noise of the batch


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "flat-lora", "perturb_draw": "low_rank"}, ["forward", "trainer"]),
        pytest.param({"method": "flat-lora", "perturb_draw": "full"}, ["forward", "trainer"], marks=pytest.mark.long),
        pytest.param({"method": "nbar"}, ["forward", "trainer"], marks=pytest.mark.long),
        pytest.param({"method": "lora-sam"}, ["forward", "sam", "forward", "trainer"], marks=pytest.mark.long),
        ({"method": "sam", "rho": 0.05, "rho_rise": None}, ["sketch", "forward", "sam", "forward", "trainer"]),
        pytest.param({"method": "bi-lora"}, ["forward", "trainer", "bi_lora", "bi_lora"], marks=pytest.mark.long),
        ({"method": "lora", "gradient_accumulation_steps": 2}, ["forward", *BATCH, "forward", "trainer"]),
    ],
    ids=str,
)
def test_a_step_waits_for_its_log_and_for_the_direction_of_sam(
    waits_of: Callable[..., list[str]], settings: dict[str, Any], expected: list[str]
) -> None:
    assert waits_of(**settings) == [*BATCH, *expected]


def test_the_scaler_of_fp16_adds_no_wait(waits_of: Callable[..., list[str]]) -> None:
    assert waits_of(scaler=torch.amp.GradScaler("cpu"), method="lora") == [*BATCH, "forward", "trainer"]


def test_a_device_read_within_a_pass_is_detected(
    waits_of: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = micro_batches.diffusion_loss

    def with_a_read(*given: Any) -> Tensor:
        loss = plain(*given)
        assert float(loss) == 1
        return loss

    monkeypatch.setattr(micro_batches, "diffusion_loss", with_a_read)
    assert waits_of(method="lora") == [*BATCH, "forward", "micro_batches", "trainer"]


def test_a_generator_of_another_device_is_detected() -> None:
    with OwnGenerators():
        torch.randn(3, device=META, generator=AnyDevice(META))
        with pytest.raises(AssertionError, match="normal_ has a generator of another device"):
            torch.empty(3, device=META).normal_(generator=AnyDevice("cpu"))
