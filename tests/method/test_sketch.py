"""The sketch of dL/dW: all of it where its rank is no larger, and of what SAM makes of it nearly all where it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers
from peft import get_peft_model
from tiny_models import Adapter, normal, randomize_adapters, seeded
from tiny_runs import samples_of
from torch import Tensor, nn

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.method.rivals.sketch import SKETCH_RANK, Sketches
from flatlora_diffusion.method.rivals.weight_gradients import WeightGradientHook
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.training.micro_batches import micro_batches
from flatlora_diffusion.training.state import TrainState, prepare

ICONS = Path(__file__).parents[2] / "samples" / "icons_3d"
LAYERS = {
    "linear": lambda: nn.Linear(40, 24),
    "tokens": lambda: nn.Linear(40, 24, bias=False),
    "few outputs": lambda: nn.Linear(40, 3),
    "few inputs": lambda: nn.Linear(5, 24),
    "1x1": lambda: nn.Conv2d(12, 20, 1),
    "3x3 padded": lambda: nn.Conv2d(6, 20, 3, padding=1),
    "3x3 strided": lambda: nn.Conv2d(6, 20, 3, stride=2, padding=1),
    "uneven": lambda: nn.Conv2d(6, 20, (3, 2), stride=(1, 2), padding=(0, 1)),
}


def model_of(name: str) -> Any:
    with seeded(0):
        layer = LAYERS[name]()
        model = get_peft_model(nn.Sequential(layer), Adapter().config(("0",)))
    randomize_adapters(model)
    return model


def inputs(model: Any, name: str, rows: int, seed: int) -> Tensor:
    weight = next(iter(lora_layers(model).values())).get_base_layer().weight
    if weight.ndim == 4:  # so small that there are `rows` places in all
        return normal(seed, 1, weight.shape[1], 4, 5) if rows > 4 else normal(seed, 1, weight.shape[1], 3, 3)
    return normal(seed, 2, rows // 2, weight.shape[1]) if name == "tokens" else normal(seed, rows, weight.shape[1])


def few_places(model: Any, name: str, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs, and dL/d(output) that is 0 but at three places, so that dL/dW has rank 3."""
    x = inputs(model, name, 6, seed)
    output = model(x)
    filters_last = torch.zeros_like(output if output.ndim < 4 else output.movedim(1, -1))
    places = filters_last.view(-1, filters_last.shape[-1])
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))[:3]
    places[chosen] = normal(seed + 50, len(chosen), places.shape[1])
    return x, filters_last if output.ndim < 4 else filters_last.movedim(-1, 1)


def slope_by_autograd(model: Any, calls: list[tuple[Tensor, Tensor]]) -> Tensor:
    """dL/dW in float64, of the base layer alone."""
    base = next(iter(lora_layers(model).values())).get_base_layer()
    weight = base.weight.detach().double().requires_grad_(True)
    for x, slope in calls:
        outputs = torch.func.functional_call(base, {"weight": weight, **_bias(base)}, (x.double(),))
        (outputs * slope).sum().backward()
    assert weight.grad is not None
    return weight.grad.flatten(1)


def _bias(base: Any) -> dict[str, Tensor]:
    return {} if base.bias is None else {"bias": base.bias.detach().double()}


def sketch_of(model: Any, calls: list[tuple[Tensor, Tensor]], seed: int = 0, step: int = 0) -> tuple[Tensor, Tensor]:
    """R and Q."""
    hook = WeightGradientHook([model])
    with hook.recording(Sketches(seed, step)) as sketches:
        for x, slope in calls:
            (model(x) * slope).sum().backward()
    hook.detach()
    factors = sketches.factors(hook.layers[0])
    assert factors is not None
    return factors


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("calls", [1, 2], ids=["", "two micro-batches"])
def test_a_gradient_of_smaller_rank_is_sketched_exactly(name: str, calls: int) -> None:
    model = model_of(name)
    given = [few_places(model, name, seed) for seed in range(1, calls + 1)]
    expected = slope_by_autograd(model, given)
    assert torch.linalg.matrix_rank(expected) <= SKETCH_RANK
    down, up = sketch_of(model, given)
    assert down.shape[0] == up.shape[1] == min(SKETCH_RANK, len(expected))
    assert_alike(up @ down, expected)
    torch.testing.assert_close(up.mT @ up, torch.eye(up.shape[1]), rtol=0, atol=1e-5)


def assert_alike(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_layer_called_twice_in_one_pass_is_sketched_with_both_calls() -> None:
    model = model_of("linear")
    first, second = few_places(model, "linear", 1), few_places(model, "linear", 2)
    hook = WeightGradientHook([model])
    with hook.recording(Sketches(0, 0)) as sketches:
        ((model(first[0]) * first[1]).sum() + (model(second[0]) * second[1]).sum()).backward()
    factors = sketches.factors(hook.layers[0])
    assert factors is not None
    assert_alike(factors[1] @ factors[0], slope_by_autograd(model, [first, second]))


def test_the_sketch_of_a_larger_rank_has_most_of_its_norm() -> None:
    model = model_of("linear")
    x, slope = normal(1, 64, 40) * torch.logspace(0, -2, 40), normal(2, 64, 24)
    whole = slope_by_autograd(model, [(x, slope)])
    down, up = (factor.double() for factor in sketch_of(model, [(x, slope)]))
    torch.testing.assert_close(down, up.mT @ whole, rtol=1e-4, atol=1e-4)
    best = torch.linalg.svdvals(whole)[:SKETCH_RANK].norm()
    assert 0.9 * best < down.norm() <= best * (1 + 1e-6)


def test_a_sketch_is_a_function_of_seed_and_step_and_not_of_the_global_generator() -> None:
    model = model_of("linear")
    given = [(normal(1, 64, 40), normal(2, 64, 24))]
    first = sketch_of(model, given, seed=3, step=5)
    state = torch.random.get_rng_state()
    torch.testing.assert_close(sketch_of(model, given, seed=3, step=5), first, rtol=0, atol=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    for other in ({"seed": 4, "step": 5}, {"seed": 3, "step": 6}):
        assert not torch.allclose(sketch_of(model, given, **other)[0], first[0], atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "least"),
    [
        ({}, 0.99),
        ({"train_batch_size": 1, "gradient_accumulation_steps": 4}, 0.99),
        ({"lora_target_modules": "conv"}, 0.98),  # slopes of convolutions have more ranks
    ],
    ids=str,
)
def test_sam_changes_the_gradient_as_with_the_full_gradient(
    settings: dict[str, Any], least: float, tmp_path: Path
) -> None:
    """On the tiny base, which is trained, with W + rho G / ||G|| written into W by hand."""
    given = {"pretrained_model_name_or_path": "tiny", "instance_data_dir": str(ICONS), "output_dir": str(tmp_path)}
    config = TrainConfig.from_dict({**given, "method": "sam", "rho": 0.25, "train_batch_size": 2, "seed": 3})
    config = config.replace(report_to="none", **settings)
    state = prepare(config, samples_of(config))
    for name, parameter in state.trainable.items():
        if ".lora_B." in name:
            parameter.data = 0.02 * normal(len(name), *parameter.shape)
    drawn = list(micro_batches(state, 0, DrawHash()))
    weights = [layer.get_base_layer().weight for layer in lora_layers(state.model).values()]
    for weight in weights:
        weight.requires_grad_(True)
    slopes = torch.autograd.grad(torch.stack([batch.loss() for batch in drawn]).mean(), weights)
    length = torch.stack([slope.norm() for slope in slopes]).norm()
    for weight in weights:
        weight.requires_grad_(False)
    plain = gradient_of(state, drawn)
    state.gradient.compute(0, drawn)
    ours = flat([parameter.grad for parameter in state.trainable.values()]) - plain
    for weight, slope in zip(weights, slopes, strict=True):
        weight.data += 0.25 * slope / length
    theirs = gradient_of(state, drawn) - plain
    assert theirs.norm() > 0.05 * plain.norm()
    assert nn.functional.cosine_similarity(ours, theirs, dim=0) > least
    assert ours.norm() / theirs.norm() == pytest.approx(1, abs=0.05)


def gradient_of(state: TrainState, drawn: list[Any]) -> Tensor:
    loss = torch.stack([batch.loss() for batch in drawn]).mean()
    return flat(torch.autograd.grad(loss, list(state.trainable.values())))


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.fixture
def wide() -> tuple[WeightGradientHook, Tensor, Tensor]:
    """A layer of 1,600 inputs, and x and dL/d(output) of 64 tokens with a main direction, as gradients have."""
    with seeded(0):
        model = get_peft_model(nn.Sequential(nn.Linear(1600, 640)), Adapter().config(("0",)))
    x, slopes = (normal(seed, 64, 3) @ normal(seed + 1, 3, size) for seed, size in ((1, 1600), (3, 640)))
    return WeightGradientHook([model]), x, slopes


def test_large_inputs_in_fp16_do_not_overflow_in_the_sketch(wide: tuple[WeightGradientHook, Tensor, Tensor]) -> None:
    hook, x, slopes = wide
    x = x / x.abs().max() * 6e3
    sketches = Sketches(0, 0)
    sketches.add(hook.layers[0], x.half(), slopes.half())
    factors = sketches.factors(hook.layers[0])
    assert factors is not None
    whole = slopes.T @ x
    assert (factors[1] @ factors[0] - whole).norm() < 0.01 * whole.norm()


def test_a_small_eps_of_sam_is_not_lost_to_the_range_of_fp16(wide: tuple[WeightGradientHook, Tensor, Tensor]) -> None:
    """A rho of 0.001 over the 560 layers of SDXL gives a layer an eps of this length."""
    hook, x, slopes = wide
    sketches = Sketches(0, 0)
    sketches.add(hook.layers[0], x, slopes)
    sketches.scale(0.001 / 560**0.5 / sketches.norm())
    factors = sketches.factors(hook.layers[0])
    assert factors is not None
    exact, rounded = factors[1] @ factors[0], factors[1].half().float() @ factors[0].half().float()
    assert exact.norm() == pytest.approx(0.001 / 560**0.5, rel=1e-3)
    assert (rounded - exact).norm() < 0.005 * exact.norm()
