"""AdaLoRA (arXiv:2303.10512): the layers share a budget of ranks, which shrinks during the run.

    W' = W + s B diag(E) A

Each layer starts with more ranks than --rank. The least important ranks of all layers have their E set to 0, until
the mean is --rank. PEFT scores and masks the ranks; this module has the schedule: all ranks for the first tenth of the
run, then fewer, and the final ranks for the last three tenths.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from peft import AdaLoraConfig
from peft.tuners.adalora import RankAllocator
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers

_INIT_STD = 0.02  # of A and B, as in PEFT and the paper's code


def adalora_config(rank: int, alpha: float | None, dropout: float, targets: list[str] | str) -> AdaLoraConfig:
    """PEFT's config for a final mean rank of `rank` and s = alpha / rank."""
    first = math.ceil(1.5 * rank)  # with which each layer starts
    return AdaLoraConfig(
        target_r=rank,
        init_r=first,
        lora_alpha=first if alpha is None else alpha / rank * first,
        lora_dropout=dropout,
        target_modules=targets,
        total_step=1,  # set by `RankBudget`
    )


@torch.no_grad()
def initialize(layer: Any, noise: Tensor) -> None:
    """Set A (r, n) and B (m, r) to 0.02 times `noise`, (r, n + m) from N(0, 1), and E to 0, so that W' = W."""
    down, up = (noise * _INIT_STD).split([layer.in_features, layer.out_features], dim=1)
    layer.lora_A[ADAPTER].copy_(down)
    layer.lora_B[ADAPTER].copy_(up.T)
    layer.lora_E[ADAPTER].zero_()
    layer.ranknum[ADAPTER].data = layer.ranknum[ADAPTER].data.float()
    layer.ranknum[ADAPTER].requires_grad_(False)  # PEFT leaves it trainable


def orthogonality(model: nn.Module) -> Tensor:
    """PEFT's penalty, 0.5 times the mean of ||P P^T - I||_F, which keeps rows of A and columns of B orthonormal."""
    factors = [
        factor for layer in lora_layers(model).values() for factor in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T)
    ]
    identity = torch.eye(len(factors[0]), device=factors[0].device)
    # Stacked: a model has hundreds of layers, of few shapes.
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for factor in factors:
        by_shape.setdefault(factor.shape, []).append(factor)
    stacks = [torch.stack(group) for group in by_shape.values()]
    norms = [torch.linalg.matrix_norm(stack @ stack.mT - identity) for stack in stacks]
    return AdaLoraConfig.orth_reg_weight * torch.cat(norms).mean()


class RankBudget:
    """The ranks that the layers of `model` have left during a run of `total_steps`."""

    def __init__(self, model: Any, total_steps: int) -> None:
        self._model = model
        config = dataclasses.replace(
            model.peft_config[ADAPTER],
            total_step=total_steps,
            tinit=total_steps // 10,
            tfinal=3 * total_steps // 10,
            deltaT=max(1, total_steps // 100),
        )
        self._end = total_steps - config.tfinal
        self._ranks = RankAllocator(model, config, ADAPTER)
        self._left: dict[str, list[bool]] | None = None
        self._is_settled = False

    def step_done(self, done: int) -> None:
        """Update the ranks after optimizer step `done`, counted from 1, before its gradients are zeroed."""
        if self._is_settled:
            self._ranks.mask_using_rank_pattern(self._model, self._left)
            return
        is_end = done >= self._end
        if is_end and not self._ranks.exp_avg_ipt:  # a run of one step
            self._ranks.update_ipt(self._model)
        self._left = self._ranks.update_and_allocate(self._model, done, force_mask=is_end)[1] or self._left
        self._is_settled = is_end

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values for a checkpoint."""
        tensors = {f"importance.{name}": value for name, value in self._ranks.exp_avg_ipt.items()}
        tensors |= {f"uncertainty.{name}": value for name, value in self._ranks.exp_avg_unc.items()}
        return tensors, {"left": self._left, "is_settled": self._is_settled}

    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Restore the values of `state`."""
        devices = {name: parameter.device for name, parameter in self._model.named_parameters()}
        self._ranks.reset_ipt()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            averages = self._ranks.exp_avg_ipt if kind == "importance" else self._ranks.exp_avg_unc
            averages[name] = value.to(devices[name])
            self._ranks.ipt[name] = torch.zeros_like(averages[name])  # recomputed in each step
        self._left, self._is_settled = header["left"], header["is_settled"]
