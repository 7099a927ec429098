"""A LoRA that starts away from zero on a base that is never written: a frozen second one takes its start away.

PiSSA (arXiv:2404.02948) starts A and B at the largest directions of W and trains them on the residual W - s B0 A0.
LoRA-GA (arXiv:2407.05000) starts them at the largest directions of dL/dW.
PEFT writes that residual into the base. Here the base stays what it is, and A0, B0 are an adapter of their own with
the scale -s, always on and never trained:

    W' = (W - s B0 A0) + s B A = W + s B A - s B0 A0

So frozen weights keep their bits, also quantized ones, what perturbs W' sees both, and the plain LoRA of twice the
rank, [B, -B0] [A; A0], is exact on the original base.

Layers are linear and have at least as many directions as PiSSA's A and B start at, or LoRA-GA's A beside its B.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, LoraGAConfig, get_peft_model
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import ADAPTER, base_weight, lora_layers
from flatlora_diffusion.config import AdapterConfig
from flatlora_diffusion.storage.rng import derive_seed

ANCHOR = "start"


@torch.no_grad()
def start_pissa(model: Any, lora: LoraConfig, config: AdapterConfig, seed: int) -> None:
    """Start the LoRA `lora` of `model` at the largest directions of each W, by PEFT's PiSSA, and anchor it there."""
    iterations = config.effective_pissa_iterations
    how = {"init_lora_weights": f"pissa_niter_{iterations}" if iterations else "pissa"}
    for layer in lora_layers(model).values():
        if not layer.get_base_layer().weight.is_meta:  # where nothing but shapes is wanted
            _put(layer, _by_peft(layer, how, seed), [ADAPTER])
    anchor(model, lora)


def prepare_lora_ga(model: Any, lora: LoraConfig, config: AdapterConfig, seed: int) -> None:
    """Anchor the LoRA `lora` of `model`; `start_at_slopes` moves both once there are gradients."""
    anchor(model, lora)


@torch.no_grad()
def start_at_slopes(model: Any, slopes: Mapping[str, Tensor], seed: int) -> None:
    """Let the anchored LoRA of `model` start at the largest directions of dL/dW, by PEFT's LoRA-GA.

    `slopes` has dL/dW of each layer by name.
    """
    how = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    for name, layer in lora_layers(model).items():
        _put(layer, _by_peft(layer, how, seed, slopes[name].cpu()), [ADAPTER, ANCHOR])


def anchors(model: nn.Module) -> dict[str, Tensor]:
    """A0 and B0 of each layer by name; empty for a LoRA that started from zero."""
    return {name: weight for name, weight in model.named_parameters() if f".{ANCHOR}." in name}


def anchor(model: Any, lora: LoraConfig) -> None:
    """Put what A and B are now on `model` with the opposite scale, frozen."""
    alphas = {name: -alpha for name, alpha in lora.alpha_pattern.items()}
    opposite = dataclasses.replace(lora, lora_alpha=-lora.lora_alpha, alpha_pattern=alphas, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are what is wanted
        model.add_adapter(opposite, ANCHOR)
    model.set_adapter([ADAPTER, ANCHOR])
    for layer in lora_layers(model).values():
        for sides in (layer.lora_A, layer.lora_B):
            sides[ANCHOR].weight = nn.Parameter(sides[ADAPTER].weight.detach().clone(), requires_grad=False)


def _put(layer: Any, factors: tuple[Tensor, Tensor], adapters: Sequence[str]) -> None:
    for sides, factor in zip((layer.lora_A, layer.lora_B), factors, strict=True):
        for adapter in adapters:
            sides[adapter].weight.copy_(factor)


def _by_peft(layer: Any, how: Mapping[str, Any], seed: int, slope: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A and B where PEFT starts them for W (m, n) and dL/dW, found on a layer of its own that holds a copy.

    On the CPU, so that one seed gives one LoRA on every device.
    """
    weight, rank = base_weight(layer.get_base_layer()).cpu(), layer.r[ADAPTER]
    alone: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    alone.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if slope is not None:
        alone._peft_loraga_grad = slope  # where PEFT's `preprocess_loraga` leaves it
    config = LoraConfig(r=rank, lora_alpha=layer.scaling[ADAPTER] * rank, target_modules=["0"], **how)
    with torch.random.fork_rng(devices=[]):  # the fast SVD draws from the global generator
        torch.manual_seed(derive_seed(seed, "start"))
        (started,) = lora_layers(get_peft_model(nn.Sequential(alone), config)).values()
    return started.lora_A[ADAPTER].weight, started.lora_B[ADAPTER].weight
