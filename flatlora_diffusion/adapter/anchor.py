"""A LoRA that starts away from zero on a base that is never written: a frozen second one takes its start away.

PiSSA (arXiv:2404.02948) starts A and B at the largest directions of W and trains them on the residual W - s B0 A0.
PEFT writes that residual into the base. Here the base stays what it is, and A0, B0 are an adapter of their own with
the scale -s, always on and never trained:

    W' = (W - s B0 A0) + s B A = W + s B A - s B0 A0

So frozen weights keep their bits, also quantized ones, what perturbs W' sees both, and the plain LoRA of twice the
rank, [B, -B0] [A; A0], is exact on the original base.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import ADAPTER, base_weight, lora_layers
from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.ground.seeds import derive_seed

ANCHOR = "start"


@torch.no_grad()
def start_at_principal(model: Any, lora: LoraConfig, iterations: int, seed: int) -> None:
    """Let the LoRA `lora` of `model` start at the largest directions of each W, by PEFT's PiSSA, and anchor it there.

    `iterations` are those of the fast SVD, 0 for the exact one. Raises ConfigError for a convolution and for a layer
    with fewer directions than the rank.
    """
    for name, layer in lora_layers(model).items():
        base, rank = layer.get_base_layer(), layer.r[ADAPTER]
        if not isinstance(base, nn.Linear):
            raise ConfigError(f"--adapter pissa adapts linear layers only, not {name}; leave it out of the targets")
        if rank > min(base.in_features, base.out_features):
            raise ConfigError(f"rank={rank} is more than {name} has directions for --adapter pissa; lower --rank")
        if base.weight.is_meta:
            continue  # nothing but shapes is wanted
        down, up = _principal(base_weight(base).cpu(), rank, layer.scaling[ADAPTER], iterations, seed)
        layer.lora_A[ADAPTER].weight.copy_(down)
        layer.lora_B[ADAPTER].weight.copy_(up)
    _anchor(model, lora)


def anchors(model: nn.Module) -> dict[str, Tensor]:
    """A0 and B0 of each layer by name; empty for a LoRA that started from zero."""
    return {name: weight for name, weight in model.named_parameters() if f".{ANCHOR}." in name}


def _anchor(model: Any, lora: LoraConfig) -> None:
    """Put what A and B are now on `model` with the opposite scale, for good."""
    alphas = {name: -alpha for name, alpha in lora.alpha_pattern.items()}
    opposite = dataclasses.replace(lora, lora_alpha=-lora.lora_alpha, alpha_pattern=alphas, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two are what is wanted
        model.add_adapter(opposite, ANCHOR)
    model.set_adapter([ADAPTER, ANCHOR])
    for layer in lora_layers(model).values():
        for sides in (layer.lora_A, layer.lora_B):
            sides[ANCHOR].weight.data = sides[ADAPTER].weight.detach().clone()
            sides[ANCHOR].requires_grad_(False)


def _principal(weight: Tensor, rank: int, scale: float, iterations: int, seed: int) -> tuple[Tensor, Tensor]:
    """A and B of PEFT's PiSSA for W (m, n), found on a layer of its own that holds a copy."""
    alone = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    alone.weight = nn.Parameter(weight.clone(), requires_grad=False)
    how = f"pissa_niter_{iterations}" if iterations else "pissa"
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=["0"], init_lora_weights=how)
    with torch.random.fork_rng(devices=[]):  # the fast SVD draws from the global generator
        torch.manual_seed(derive_seed(seed, "pissa"))
        (layer,) = lora_layers(get_peft_model(nn.Sequential(alone), config)).values()
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
