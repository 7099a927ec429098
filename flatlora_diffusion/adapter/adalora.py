"""AdaLoRA (arXiv:2303.10512): the layers share a budget of ranks, which shrinks as the run goes on.

    W' = W + s B diag(E) A

begins with more ranks than --rank in each layer; those that matter least over all layers have their E set to 0, until
the layers have --rank of them in the mean. PEFT scores and takes them; here is when: none in the first tenth of the
run, all that have to go until the last three tenths, which train what is left.
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

_STD = 0.02  # of A and B at the start, as in PEFT and the paper's code


def adalora_config(rank: int, alpha: float | None, dropout: float, targets: list[str] | str) -> AdaLoraConfig:
    """That of `rank` in the mean at the end, s = alpha / rank, begun with half as many ranks again."""
    first = first_rank(rank)
    return AdaLoraConfig(
        target_r=rank,
        init_r=first,
        lora_alpha=first if alpha is None else alpha / rank * first,
        lora_dropout=dropout,
        target_modules=targets,
        total_step=1,  # `RankBudget` knows
    )


def first_rank(rank: int) -> int:
    """The rank with which each layer begins."""
    return math.ceil(1.5 * rank)


@torch.no_grad()
def start_from_seed(layer: Any, draw: Tensor) -> None:
    """A (r, n) and B (m, r) ~ N(0, 0.02^2) from `draw`, (r, n + m) of N(0, 1); E = 0, so that W' = W."""
    down, up = (draw * _STD).split([layer.in_features, layer.out_features], dim=1)
    layer.lora_A[ADAPTER].copy_(down)
    layer.lora_B[ADAPTER].copy_(up.T)
    layer.lora_E[ADAPTER].zero_()
    layer.ranknum[ADAPTER].data = layer.ranknum[ADAPTER].data.float()
    layer.ranknum[ADAPTER].requires_grad_(False)  # PEFT leaves it trainable on no device


def orthogonality(model: nn.Module) -> Tensor:
    """PEFT's penalty, which holds the rows of A and the columns of B apart: 0.5 times the mean of ||P P^T - I||_F."""
    sides = [
        side for layer in lora_layers(model).values() for side in (layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].T)
    ]
    ones = torch.eye(len(sides[0]), device=sides[0].device)
    # Stacked: a model has hundreds of layers, of few shapes.
    alike: dict[torch.Size, list[Tensor]] = {}
    for side in sides:
        alike.setdefault(side.shape, []).append(side)
    stacks = [torch.stack(members) for members in alike.values()]
    norms = [torch.linalg.matrix_norm(stack @ stack.mT - ones) for stack in stacks]
    return AdaLoraConfig.orth_reg_weight * torch.cat(norms).mean()


class RankBudget:
    """Which ranks the layers of `model` have left, step by step of a run of `total_steps`."""

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
        """Follow optimizer step number `done`, counted from 1, whose gradients must still be there."""
        if self._is_settled:
            self._ranks.mask_using_rank_pattern(self._model, self._left)
            return
        is_end = done >= self._end
        if is_end and not self._ranks.exp_avg_ipt:  # a run of one step
            self._ranks.update_ipt(self._model)
        self._left = self._ranks.update_and_allocate(self._model, done, force_mask=is_end)[1] or self._left
        self._is_settled = is_end

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a resumed run needs: tensors by name, and JSON-able values."""
        tensors = {f"importance.{name}": value for name, value in self._ranks.exp_avg_ipt.items()}
        tensors |= {f"uncertainty.{name}": value for name, value in self._ranks.exp_avg_unc.items()}
        return tensors, {"left": self._left, "is_settled": self._is_settled}

    def load_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        places = {name: parameter.device for name, parameter in self._model.named_parameters()}
        self._ranks.reset_ipt()
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            kept = self._ranks.exp_avg_ipt if kind == "importance" else self._ranks.exp_avg_unc
            kept[name] = value.to(places[name])
            self._ranks.ipt[name] = torch.zeros_like(kept[name])  # taken anew in each step
        self._left, self._is_settled = header["left"], header["is_settled"]
