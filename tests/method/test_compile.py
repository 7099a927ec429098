"""A perturbed model can be compiled by `torch.compile`; what is compiled serves all steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import Case, loss_and_gradients, normal, seeded, unet_case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from flatlora_diffusion import FlatLora

LAYERS = 2
BREAKS_PER_LAYER = 5  # of full draws, which make a random generator in each pass


@pytest.fixture
def case() -> Case:
    with seeded(0):
        base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    inputs = normal(1, 5, 12)
    torch._dynamo.reset()
    return Case(model, lambda module: module(inputs), normal(2, 5, 12))


def test_a_model_with_low_rank_draws_compiles_once_and_trains_the_same(case: Case) -> None:
    eager = copy.deepcopy(case.model)
    backend = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(case.model, backend=backend)
    flat, reference = (FlatLora(model, schedule="constant", draw="low_rank") for model in (case.model, eager))
    for step in range(3):
        with flat.perturb(step), reference.perturb(step):
            (loss, gradients), (expected_loss, expected) = (
                loss_and_gradients(case, compiled),
                loss_and_gradients(case, eager),
            )
        torch.testing.assert_close(loss, expected_loss)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[f"_orig_mod.{name}"], gradient)
    assert backend.frame_count == 1, "a graph break, or compiled again for another step"


@pytest.mark.long
def test_full_draws_break_the_graph_a_few_times_per_layer(case: Case) -> None:
    flat = FlatLora(case.model, schedule="constant", draw="full")
    with flat.perturb(1):
        report = torch._dynamo.explain(case.predict)(case.model)
    assert 0 < report.graph_break_count <= BREAKS_PER_LAYER * LAYERS


@pytest.mark.long
def test_a_unet_and_its_loss_are_one_graph_under_low_rank_draws() -> None:
    case = unet_case()
    flat = FlatLora(case.model, schedule="constant", draw="low_rank")
    torch._dynamo.reset()

    def loss(model: nn.Module) -> Tensor:
        return nn.functional.mse_loss(case.predict(model).float(), case.target)

    with flat.perturb(1):
        perturbed = torch._dynamo.explain(loss)(case.model)
    assert (perturbed.graph_count, perturbed.graph_break_count) == (1, 0), perturbed.break_reasons
