"""How many operators that work on numbers, which are launches on a GPU, a perturbed step adds for each layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import seeded
from torch import Tensor, nn

from benchmarks.turns import launches
from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import DrawKind

LAYERS = 40


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with seeded(0):
        layers = [module for _ in range(LAYERS) for module in (nn.Linear(16, 16), nn.Tanh())]
        names = [str(index) for index in range(0, 2 * LAYERS, 2)]
        return get_peft_model(nn.Sequential(*layers), LoraConfig(r=4, target_modules=names, init_lora_weights=False))


def step_of(model: nn.Module, flat: FlatLora | None, autocast: bool) -> Callable[[int], float]:
    inputs = torch.ones(8, 16)

    def step(index: int) -> float:
        model.zero_grad(set_to_none=True)
        with flat.perturb(index) if flat else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss: Tensor = model(inputs).sum()
            loss.backward()
        return 0.0

    return step


@pytest.mark.parametrize(
    ("draw", "norm_every", "autocast", "bound"),
    [
        pytest.param("low_rank", 1, False, 4, id="low-rank"),
        pytest.param("low_rank", 9, False, 2.5, id="low-rank, norms kept"),
        pytest.param("low_rank", 9, True, 1.5, id="low-rank in bf16, norms kept"),
        pytest.param("full", 1, False, 6, id="full"),
        pytest.param("full", 9, False, 4.5, id="full, norms kept"),
    ],
)
def test_a_perturbed_step_adds_few_launches_a_layer(
    model: nn.Module, draw: DrawKind, norm_every: int, autocast: bool, bound: float
) -> None:
    plain = step_of(model, None, autocast)
    plain(0)
    without = launches(plain, 1)
    flat = FlatLora(model, schedule="constant", draw=draw, norm_every=norm_every)
    try:
        perturbed = step_of(model, flat, autocast)
        for warmup in range(2):  # the second step knows the dtype that the first computed in
            perturbed(warmup)
        added = (launches(perturbed, 2) - without) / LAYERS
    finally:
        flat.detach()
    print(f"{added:+.2f} launches a layer")
    assert added <= bound
