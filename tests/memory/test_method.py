"""What a method holds in a step: the estimate against the method itself, whose step is taken on `meta`."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flatlora_diffusion.adapter.lora import add_lora, trainable_parameters
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.families.sdxl.shapes import on_meta
from flatlora_diffusion.memory.estimate import estimate_memory
from flatlora_diffusion.memory.meta_allocator import AsOnGpu, LiveBytes
from flatlora_diffusion.method import draw, layers
from flatlora_diffusion.method.gradient import GradientInputs, step_gradient
from flatlora_diffusion.method.rivals import sam, weight_gradients
from flatlora_diffusion.method.rivals.weight_gradients import read_weight_gradients

META = torch.device("meta")
IMAGES, SIDE = 2, 32  # of the latents
WIDTHS = {"block_out_channels": (320, 640, 640), "attention_head_dim": (5, 10, 10), "cross_attention_dim": 2048}


@pytest.fixture(scope="module")
def wide(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with few layers, as wide as SDXL's: only its shapes are read."""
    folder = shutil.copytree(base, tmp_path_factory.mktemp("wide") / "base")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | WIDTHS), encoding="utf-8")
    return folder


class AnyDevice(torch.Generator):
    """A generator that may be asked for on any device: of its numbers nothing is read here."""

    device: Any = property(lambda _: META)

    def __new__(cls, device: Any = "cpu") -> Any:
        made: Any = super().__new__
        return made(cls, device="cpu")


class Micro:
    """A micro-batch of the UNet alone."""

    slot = 0

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        shapes = {"sample": (IMAGES, 4, SIDE, SIDE), "prompt_embeds": (IMAGES, 77, 2048), "pooled": (IMAGES, 24)}
        self.inputs = {name: torch.empty(shape, device=META).bfloat16() for name, shape in shapes.items()}
        self.inputs |= {"time_ids": torch.empty(IMAGES, 6, device=META), "timesteps": torch.ones(IMAGES, device=META)}

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        given = self.inputs
        added = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]}
        inputs = given["sample"], given["timesteps"], given["prompt_embeds"]
        output = self.unet(*inputs, added_cond_kwargs=added, return_dict=False)[0].float()
        loss: Tensor = (output - given["sample"]).square().mean() * weight
        del output
        loss.backward()
        return loss.detach()


def peak_of_steps(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """The most bytes beside weights, the LoRA's gradients and a second LoRA's optimizer state, in two steps."""
    monkeypatch.setattr(torch, "Generator", AnyDevice)
    for module in (layers, draw, weight_gradients):  # as under autocast
        monkeypatch.setattr(module, "compute_dtype", lambda device, otherwise: torch.bfloat16)
    monkeypatch.setattr(sam, "_can_ascend", lambda length: True)  # nothing can be read
    unet = on_meta(config.model, "unet").bfloat16().train()
    add_lora(unet, config.adapter, 0)
    if config.optim.gradient_checkpointing:  # what is computed again is computed as on a GPU, too
        again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AsOnGpu(torch.bfloat16)))
        unet.enable_gradient_checkpointing(again)
    trained = trainable_parameters(unet)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.grad = torch.empty_like(parameter)
    micro = Micro(unet)
    known = [
        *unet.parameters(),
        *unet.buffers(),
        *(parameter.grad for parameter in trained.values() if parameter.grad is not None),
    ]
    with AsOnGpu(torch.bfloat16), LiveBytes([*known, *micro.inputs.values()]) as held:
        if config.adapter.adapter == "lora-ga":
            read_weight_gradients([unet], [micro] * config.adapter.effective_lora_ga_steps)
        else:
            gradient = step_gradient(GradientInputs({"unet": unet}, trained, config.perturb, seed=0, total_steps=10))
            for step in (0, 9):  # with sigma 0, where Flat-LoRA is plain LoRA, and with noise
                gradient.compute(step, [micro] * config.optim.gradient_accumulation_steps)
    return held.peak + sum(tensor.nbytes for tensor in micro.inputs.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sam"},
        pytest.param({"method": "sam", "gradient_checkpointing": True}, marks=pytest.mark.long),
        pytest.param(
            {"method": "sam", "lora_target_modules": "conv", "gradient_accumulation_steps": 2}, marks=pytest.mark.long
        ),
        pytest.param({"method": "lora", "adapter": "lora-ga", "lora_ga_steps": 3}, marks=pytest.mark.long),
        pytest.param({"method": "bi-lora"}, marks=pytest.mark.long),
        pytest.param({"method": "bi-lora", "gradient_checkpointing": True}, marks=pytest.mark.long),
        pytest.param({"method": "lora-sam"}, marks=pytest.mark.long),
        {"method": "flat-lora"},
        pytest.param({"method": "flat-lora", "perturb_draw": "full"}, marks=pytest.mark.long),
        pytest.param({"method": "flat-lora", "gradient_checkpointing": True}, marks=pytest.mark.long),
        pytest.param({"method": "flat-lora", "lora_target_modules": "conv"}, marks=pytest.mark.long),
        pytest.param({"method": "flat-lora", "use_dora": True, "lora_target_modules": "conv"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_step_of_each_method_takes_the_estimated_memory(
    wide: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    config = TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(wide),
            "resolution": 4 * SIDE,
            "train_batch_size": IMAGES,
            "mixed_precision": "bf16",
            "seed": 0,
            **settings,
        }
    )
    estimate = estimate_memory(config)
    said = estimate.activations + estimate.temporary + estimate.perturbation
    if config.perturb.method == "bi-lora":
        said -= estimate.optimizer  # the second LoRA's, as large
    assert 0.95 * said < peak_of_steps(config, monkeypatch) < 1.03 * said
