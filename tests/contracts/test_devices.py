"""The contracts of the method on the device that trains: on a CPU always, on a GPU where there is one (`-m gpu`)."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_by_hand import add_to_base, all_noise, distance, lora_layers
from peft import LoraConfig, get_peft_model
from tiny_models import Case, loss_and_gradients, normal, seeded
from torch import nn
from torch.utils.checkpoint import checkpoint

from flatlora_diffusion import FlatLora

pytestmark = pytest.mark.usefixtures("draw")

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def case(request: pytest.FixtureRequest) -> Case:
    """Two linear layers and a convolution between them."""
    device = request.param
    with seeded(0):
        image = (nn.Unflatten(1, (4, 3, 3)), nn.Conv2d(4, 5, 3, padding=1), nn.Flatten())
        base = nn.Sequential(nn.Linear(12, 36), nn.Tanh(), *image, nn.Tanh(), nn.Linear(45, 7))
        config = LoraConfig(r=2, target_modules=["0", "3", "6"], init_lora_weights=False)
        model = get_peft_model(base, config).to(device)
    inputs = normal(1, 5, 12).to(device)
    return Case(model, lambda module: module(inputs), normal(2, 5, 7).to(device))


def test_gradients_are_those_of_eps_in_the_weights(case: Case) -> None:
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, schedule="constant")
    noise = all_noise(flat, step=3)
    with flat.perturb(step=3):
        loss, gradients = loss_and_gradients(case)
    expected_loss, expected = loss_and_gradients(case, add_to_base(clean, noise))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    assert distance(gradients, expected) < 1e-4


def test_w_and_the_global_generators_stay_as_they_are(case: Case) -> None:
    weights = {name: layer.get_base_layer().weight.clone() for name, layer in lora_layers(case.model).items()}
    device = next(case.model.parameters()).device
    state = torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else torch.zeros(1)
    flat = FlatLora(case.model, schedule="constant")
    for step in range(3):
        with flat.perturb(step=step):
            loss_and_gradients(case)
    for name, layer in lora_layers(case.model).items():
        assert torch.equal(layer.get_base_layer().weight, weights[name])
    assert torch.equal(torch.get_rng_state(), state[0])
    if device.type == "cuda":
        assert torch.equal(torch.cuda.get_rng_state(), state[1])


def test_sigma_0_is_plain_lora_bit_for_bit(case: Case) -> None:
    loss, plain = loss_and_gradients(copy.deepcopy(case), None)
    flat = FlatLora(case.model, sigma=0.0)
    with flat.perturb(step=3):
        found_loss, gradients = loss_and_gradients(case)
    assert torch.equal(loss, found_loss)
    assert all(torch.equal(plain[name], gradients[name]) for name in plain)


def test_under_autocast_and_checkpointing_each_pass_sees_the_same_eps(case: Case) -> None:
    device = next(case.model.parameters()).device
    flat = FlatLora(case.model, schedule="constant")
    predict = case.predict
    single = Case(case.model, predict, case.target)
    again = Case(case.model, lambda model: checkpoint(predict, model, use_reentrant=False), case.target)
    results = []
    for other in (single, again):
        case.model.zero_grad(set_to_none=True)
        with flat.perturb(step=3), torch.autocast(device.type, torch.bfloat16):
            results.append(loss_and_gradients(other))
    assert torch.isfinite(results[0][0])
    assert distance(results[1][1], results[0][1]) < 1e-3
