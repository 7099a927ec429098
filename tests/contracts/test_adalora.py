"""AdaLoRA as PEFT has it, and perturbed by its own merged weight: ranks that were taken have no part in it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lora_by_hand import add_to_base, all_noise, distance, gradients, lora_layers
from peft import AdaLoraConfig, get_peft_model
from tiny_adapters import adalora_case
from tiny_models import normal, seeded
from torch import Tensor, nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.adapter.adalora import RankBudget, orthogonality
from flatlora_diffusion.adapter.layers import ADAPTER
from flatlora_diffusion.config import DrawKind, PerturbConfig
from flatlora_diffusion.method.gradient import GradientInputs, step_gradient

STEPS = 20


class Told(nn.Module):
    """Two layers that tell their loss as a model of transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(loss=self.second(torch.tanh(self.first(x))).square().mean())


def adalora_model(config: AdaLoraConfig) -> Any:
    with seeded(0):
        model = get_peft_model(Told(), config)
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.lora_E[ADAPTER])
    return model


def test_ranks_are_pruned_when_and_where_peft_prunes_them() -> None:
    theirs = adalora_model(
        AdaLoraConfig(
            target_r=2, init_r=3, target_modules=["first", "second"], total_step=STEPS, tinit=2, tfinal=6, deltaT=1
        )
    )
    ours = copy.deepcopy(theirs)
    budget = RankBudget(ours, STEPS)
    left = set()
    for step in range(1, STEPS + 1):
        for model in (theirs, ours):
            model.zero_grad()
            model(normal(step, 8, 6)).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.05 * parameter.grad
        theirs.base_model.update_and_allocate(step)
        budget.step_done(step)
        reference, actual = theirs.state_dict(), ours.state_dict()
        assert all(torch.equal(reference[name], actual[name]) for name in reference), step
        left.add(sum(int((layer.lora_E[ADAPTER] != 0).sum()) for layer in lora_layers(ours).values()))
    assert left == {6, 5, 4}


def test_factors_stay_orthogonal_by_pefts_penalty() -> None:
    model = adalora_model(AdaLoraConfig(target_r=2, init_r=3, target_modules=["first", "second"], total_step=STEPS))
    model.base_model(normal(1, 8, 6)).loss.backward()
    expected = gradients(model)
    (model.base_model.model(normal(1, 8, 6)).loss + orthogonality(model)).backward()
    assert distance(gradients(model), expected) < 1e-6


@pytest.mark.parametrize("draw", ["full", "low_rank"])
def test_noise_is_scaled_to_the_merged_weight_after_pruning(draw: DrawKind) -> None:
    case = adalora_case()
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=0.5, schedule="constant", seed=3, draw=draw)
    for name, layer in lora_layers(clean).items():
        merged = layer.get_base_layer().weight + layer.get_delta_weight(ADAPTER)
        torch.testing.assert_close(flat.filter_norms(name), merged.norm(dim=1).detach())
    eps = all_noise(flat, step=1)
    with flat.perturb(1):
        case.loss().backward()
    result = gradients(case.model)
    moved = add_to_base(copy.deepcopy(clean), eps)
    case.loss(moved).backward()
    expected = gradients(moved)
    assert distance(result, expected) < 1e-4
    flat.detach()
    reference, actual = clean.state_dict(), case.model.state_dict()
    assert all(torch.equal(reference[name], actual[name]) for name in reference)


def test_the_second_lora_of_bi_lora_has_the_scale_of_the_first() -> None:
    case = adalora_case()
    trainable = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    inputs = GradientInputs({"": case.model}, trainable, PerturbConfig(method="bi-lora"), seed=0, total_steps=5)
    gradient: Any = step_gradient(inputs)
    assert list(gradient._scales.values()) == pytest.approx([6 / 4, 6 / 4], rel=1e-4)
