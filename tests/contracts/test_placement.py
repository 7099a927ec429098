"""Everything in a training step is on one device and waits for nothing: on `meta` other tensors and reads fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatlora_diffusion import FlatLora
from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.config import AdapterConfig, ModelConfig, ObjectiveConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.objective import diffusion_loss
from flatlora_diffusion.families.sdxl.objective import SdxlObjective, objective_of
from flatlora_diffusion.families.sdxl.shapes import on_meta
from flatlora_diffusion.method.rivals.bi_lora import BiLora

META = torch.device("meta")


class AnyDevice(torch.Generator):
    """A generator that may be asked for on any device: of its numbers nothing is read here."""

    device: Any = property(lambda _: META)

    def __new__(cls, device: Any = "cpu") -> Any:
        made: Any = super().__new__
        return made(cls, device="cpu")


class OnMeta(TorchDispatchMode):
    """Fails where an operator is given a tensor from elsewhere, beside those that copy; `meta` itself lets some pass.

    A number on the CPU may stand beside tensors of any device.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [tensor for tensor in tree_leaves((args, kwargs or {})) if isinstance(tensor, Tensor) and tensor.ndim]
        devices = {tensor.device for tensor in given}
        if META in devices and len(devices) > 1 and "copy" not in str(func):
            raise AssertionError(f"{func} was given tensors of {devices}")
        return func(*args, **(kwargs or {}))


def step(base: Path, objective: SdxlObjective, draw: str, adapter: AdapterConfig) -> list[Tensor]:
    """The gradients of one micro-batch with every tensor on `meta`."""
    unet = on_meta(ModelConfig(pretrained_model_name_or_path=str(base)), "unet")
    add_lora(unet, adapter, 0)
    flat = FlatLora(unet, sigma=0.1, schedule="constant", draw=draw)
    shapes = {"prompt_embeds": (2, 77, 40), "pooled_prompt_embeds": (2, 24)}
    batch = Batch(
        torch.empty(2, 4, 8, 8, device=META),
        prompts={name: torch.empty(shape, device=META) for name, shape in shapes.items()},
        geometry={"add_time_ids": torch.empty(2, 6, device=META)},
        mask=torch.empty(2, 1, 8, 8, device=META),
    )
    rng: Any = AnyDevice()
    noise, timesteps = objective.draw(batch.latents, rng)
    batch = objective.with_input_perturbation(batch, rng)
    with flat.perturb(0):
        diffusion_loss(unet, objective, batch, noise, timesteps).backward()
    return [tensor.grad for tensor in unet.parameters() if tensor.requires_grad and tensor.grad is not None]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("full", {}),
        ("full", {"snr_gamma": 5.0, "loss_type": "huber", "noise_offset": 0.1}),
        ("low_rank", {"multires_noise_iterations": 3, "ip_noise_gamma": 0.1, "min_timestep": 5}),
    ],
    ids=str,
)
def test_a_step_mixes_no_devices_and_reads_nothing_back(
    base: Path, monkeypatch: pytest.MonkeyPatch, kind: str, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch, "Generator", AnyDevice)
    objective = objective_of(ObjectiveConfig(**settings), DDPMScheduler())
    with OnMeta():
        gradients = step(base, objective, kind, AdapterConfig(lora_target_modules="conv"))
    assert gradients
    assert {tensor.device for tensor in gradients} == {META}


class Reads(TorchDispatchMode):
    """Counts what is copied from `meta` to the CPU, for which a real device would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].device == META and kwargs.get("device") != META:
            assert kwargs.get("dtype") is not torch.float64
            self.count += 1
            return torch.ones(args[0].shape, dtype=args[0].dtype)
        made = func(*args, **(kwargs or {}))
        has_double = any(isinstance(tensor, Tensor) and tensor.dtype is torch.float64 for tensor in tree_leaves(made))
        assert not (has_double and made.device == META), "some devices have no float64"
        return made


def test_bi_lora_reads_its_norm_from_the_device_once_and_takes_no_float64_there(base: Path) -> None:
    unet = on_meta(ModelConfig(pretrained_model_name_or_path=str(base)), "unet")
    add_lora(unet, AdapterConfig(), 0)
    gradient = BiLora({"unet": unet}, rho=0.1, seed=0)
    with Reads() as reads:
        gradient.norm()
    assert reads.count == 1


def test_another_device_and_a_wait_are_detected() -> None:
    there, here = torch.empty(3, 3, device=META, requires_grad=True), torch.ones(3, 3)
    for mixed in (
        lambda: there + here,
        lambda: there @ here,
        lambda: F.linear(there, here),
        lambda: here[there.long()],
    ):
        with pytest.raises((RuntimeError, AssertionError)), OnMeta():
            mixed()
    with pytest.raises((RuntimeError, AssertionError)), OnMeta():
        there.mul(2).backward(here)
    with pytest.raises(RuntimeError):
        float(there.sum())
