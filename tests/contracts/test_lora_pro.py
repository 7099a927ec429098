"""LoRA-Pro's gradients against least squares by hand: no other step of A and B moves W nearer to dL/dW."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers
from tiny_models import normal, toy_case
from torch import Tensor, nn

from flatlora_diffusion.method.layers import FactorPair, factor_pairs
from flatlora_diffusion.training import lora_pro
from flatlora_diffusion.training.lora_pro import LoraPro, project_gradients

SCALE = 1.5


def pair_of(slope: Tensor, down: Tensor, up: Tensor) -> FactorPair:
    """A and B with the gradients that they have where dL/dW is `slope`."""
    pair = FactorPair(nn.Parameter(down), nn.Parameter(up), SCALE)
    pair.down.grad, pair.up.grad = SCALE * up.T @ slope, SCALE * slope @ down.T
    return pair


def moved_by(pair: FactorPair) -> Tensor:
    assert pair.down.grad is not None
    assert pair.up.grad is not None
    return SCALE * (pair.up.detach() @ pair.down.grad + pair.up.grad @ pair.down.detach())


def least_squares(slope: Tensor, down: Tensor, up: Tensor, wanted: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Of all (h_A, h_B) that fit `slope` best, the nearest to `wanted`, by a dense pseudo-inverse of the whole map."""
    sizes = down.numel(), up.numel()
    columns = []
    for index in range(sum(sizes)):
        unit = torch.zeros(sum(sizes), dtype=torch.float64)
        unit[index] = 1.0
        first, second = unit.split(sizes)
        columns.append(SCALE * (up @ first.view_as(down) + second.view_as(up) @ down).flatten())
    whole = torch.stack(columns, dim=1)
    near = torch.cat([side.flatten() for side in wanted])
    best = near + torch.linalg.pinv(whole, rtol=1e-10) @ (slope.flatten() - whole @ near)
    first, second = best.split(sizes)
    return first.view_as(down), second.view_as(up)


@pytest.mark.parametrize("rank_of_b", [3, 2, 0])
def test_the_adjusted_gradients_are_the_least_squares_fit_to_the_full_one(rank_of_b: int) -> None:
    slope, down, up = (normal(seed, *shape).double() for seed, shape in enumerate([(7, 9), (3, 9), (7, 3)]))
    up[:, rank_of_b:] = 0
    pair = pair_of(slope, down, up)
    assert pair.down.grad is not None
    assert pair.up.grad is not None
    expected = least_squares(slope, down, up, (pair.down.grad.clone(), pair.up.grad.clone()))
    plain = float((moved_by(pair) - slope).norm())
    project_gradients([pair])
    torch.testing.assert_close((pair.down.grad, pair.up.grad), expected, rtol=1e-8, atol=1e-8)
    assert float((moved_by(pair) - slope).norm()) < plain


def test_layers_of_every_kind_are_adjusted_at_once_and_each_by_itself() -> None:
    case = toy_case()
    case.loss().backward()
    pairs = factor_pairs([case.model])
    assert len(pairs) == len(lora_layers(case.model))
    before = [(pair.down.grad.clone(), pair.up.grad.clone()) for pair in pairs if pair.up.grad is not None]  # type: ignore[union-attr]
    project_gradients(pairs)
    after = [(pair.down.grad.clone(), pair.up.grad.clone()) for pair in pairs if pair.up.grad is not None]  # type: ignore[union-attr]
    for pair, (first, second), expected in zip(pairs, before, after, strict=True):
        pair.down.grad, pair.up.grad = first.clone(), second.clone()
        project_gradients([pair])
        torch.testing.assert_close((pair.down.grad, pair.up.grad), expected)
        assert not torch.equal(pair.down.grad, first)
        assert not torch.equal(pair.up.grad, second)


def test_adamw_steps_with_the_adjusted_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    slope, down, up = normal(0, 7, 9), normal(1, 3, 9), normal(2, 7, 3)
    ours, byhand = pair_of(slope, down.clone(), up.clone()), pair_of(slope, down.clone(), up.clone())
    settings: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01}
    monkeypatch.setattr(lora_pro, "factor_pairs", lambda _: [ours])
    LoraPro([{"params": [ours.down, ours.up]}], [], **settings).step()
    project_gradients([byhand])
    torch.optim.AdamW([byhand.down, byhand.up], **settings).step()
    assert torch.equal(ours.down, byhand.down)
    assert torch.equal(ours.up, byhand.up)
