"""PiSSA and LoRA-GA: a LoRA that does not start at zero, while a frozen second adapter subtracts its start.

PiSSA (arXiv:2404.02948) starts A and B at the largest singular directions of W and trains them on the residual
W - s B0 A0. LoRA-GA (arXiv:2407.05000) starts them at the largest directions of dL/dW.
PEFT writes the residual into the base. Here the base is unchanged, and A0, B0 are an adapter with the scale -s that is
always active and never trained:

    W' = (W - s B0 A0) + s B A = W + s B A - s B0 A0

So frozen weights keep their bits, quantized weights included, a perturbation of W' sees both adapters, and the plain
LoRA of twice the rank, [B, -B0] [A; A0], is exact on the original base.

Layers must be linear and have enough directions: the rank for PiSSA, twice the rank for LoRA-GA.
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
    """Start the LoRA at the largest directions of each W, by PEFT's PiSSA, and add the anchor."""
    iterations = config.effective_pissa_iterations
    options = {"init_lora_weights": f"pissa_niter_{iterations}" if iterations else "pissa"}
    for layer in lora_layers(model).values():
        if not layer.get_base_layer().weight.is_meta:  # only shapes are used on the meta device
            _copy_factors(layer, _peft_start(layer, options, seed), [ADAPTER])
    add_anchor(model, lora)


def prepare_lora_ga(model: Any, lora: LoraConfig, config: AdapterConfig, seed: int) -> None:
    """Add the anchor; `start_at_gradients` sets both adapters after the first gradients."""
    add_anchor(model, lora)


@torch.no_grad()
def start_at_gradients(model: Any, gradients: Mapping[str, Tensor], seed: int) -> None:
    """Start the LoRA and its anchor at the largest directions of each layer's dL/dW, by PEFT's LoRA-GA."""
    options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    for name, layer in lora_layers(model).items():
        _copy_factors(layer, _peft_start(layer, options, seed, gradients[name].cpu()), [ADAPTER, ANCHOR])


def anchors(model: nn.Module) -> dict[str, Tensor]:
    """A0 and B0 of each layer by name; empty for a LoRA that starts at zero."""
    return {name: weight for name, weight in model.named_parameters() if f".{ANCHOR}." in name}


def add_anchor(model: Any, lora: LoraConfig) -> None:
    """Add a frozen copy of A and B with the opposite scale to `model`."""
    alphas = {name: -alpha for name, alpha in lora.alpha_pattern.items()}
    negated = dataclasses.replace(lora, lora_alpha=-lora.lora_alpha, alpha_pattern=alphas, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two adapters are intended
        model.add_adapter(negated, ANCHOR)
    model.set_adapter([ADAPTER, ANCHOR])
    for layer in lora_layers(model).values():
        for sides in (layer.lora_A, layer.lora_B):
            sides[ANCHOR].weight = nn.Parameter(sides[ADAPTER].weight.detach().clone(), requires_grad=False)


def _copy_factors(layer: Any, factors: tuple[Tensor, Tensor], adapters: Sequence[str]) -> None:
    for sides, factor in zip((layer.lora_A, layer.lora_B), factors, strict=True):
        for adapter in adapters:
            sides[adapter].weight.copy_(factor)


def _peft_start(
    layer: Any, options: Mapping[str, Any], seed: int, gradient: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The start of A and B by PEFT for W (m, n) and dL/dW, on a copy of the layer.

    On the CPU, so that a seed gives the same LoRA on every device.
    """
    weight, rank = base_weight(layer.get_base_layer()).cpu(), layer.r[ADAPTER]
    copy: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    copy.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if gradient is not None:
        copy._peft_loraga_grad = gradient  # where PEFT's `preprocess_loraga` leaves it
    config = LoraConfig(r=rank, lora_alpha=layer.scaling[ADAPTER] * rank, target_modules=["0"], **options)
    with torch.random.fork_rng(devices=[]):  # the randomized SVD uses the global generator
        torch.manual_seed(derive_seed(seed, "start"))
        (started,) = lora_layers(get_peft_model(nn.Sequential(copy), config)).values()
    return started.lora_A[ADAPTER].weight, started.lora_B[ADAPTER].weight
