"""What each rival's gradient is: that of the plain model at weights moved by hand, to which the rival never writes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from lora_by_hand import add_to_base, all_noise, distance, gradients, lora_layers, merged_weight
from tiny_models import DENOISERS, Case, loss_and_gradients, normal, toy_case
from torch import Tensor, nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.adapter.layers import ADAPTER
from flatlora_diffusion.adapter.svd_start import ANCHOR, add_anchor, start_at_gradients, start_pissa
from flatlora_diffusion.config import AdapterConfig, PerturbConfig
from flatlora_diffusion.method.gradient import GradientInputs, StepGradient, step_gradient
from flatlora_diffusion.method.rivals import sam, sketch
from flatlora_diffusion.method.rivals.bi_lora import BiLora
from flatlora_diffusion.method.rivals.weight_gradients import read_weight_gradients

RHO = 0.5


@dataclass
class Micro:
    """A share of the step on the case's one batch; counts its passes."""

    case: Case
    slot: int = 0
    share: float = 1.0
    passes: int = 0

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        self.passes += 1
        loss = self.case.loss()
        (loss * weight * self.share).backward()
        return loss.detach()


def rival(case: Case, method: str, **settings: Any) -> StepGradient:
    trainable = {name: p for name, p in case.model.named_parameters() if p.requires_grad}
    config = PerturbConfig(method=method, sigma_schedule="constant", **settings)
    return step_gradient(GradientInputs({"unet": case.model}, trainable, config, seed=3, total_steps=10))


def taken(case: Case, gradient: StepGradient, micros: Sequence[Micro] | None = None) -> dict[str, Tensor]:
    gradient.compute(1, micros or [Micro(case)])
    return gradients(case.model)


def pissa(iterations: int) -> AdapterConfig:
    return AdapterConfig(adapter="pissa", pissa_iterations=iterations)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def slopes_of_weights(case: Case, model: Any) -> dict[str, Tensor]:
    """dL/dW of each adapted layer by autograd, with W trained for the purpose."""
    layers = lora_layers(model)
    for layer in layers.values():
        layer.get_base_layer().weight.requires_grad_(True)
    case.loss(model).backward()
    gradients = {name: layer.get_base_layer().weight.grad.clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.get_base_layer().weight.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return gradients


def to_radius(slopes: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = torch.stack([slope.norm() for slope in slopes.values()]).norm()
    return {name: RHO * slope / norm for name, slope in slopes.items()}


CASES: dict[str, Callable[[], Case]] = {
    "linear and convolutions": toy_case,
    **DENOISERS,
}


@pytest.mark.parametrize("name", CASES)
def test_sam_takes_the_gradient_where_w_has_ascended_by_rho(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "SKETCH_RANK", 64)  # that of no slope here is above it
    case = CASES[name]()
    clean = copy.deepcopy(case.model)
    eps = to_radius(slopes_of_weights(case, copy.deepcopy(clean)))
    expected = loss_and_gradients(case, add_to_base(copy.deepcopy(clean), eps))[1]
    assert distance(expected, loss_and_gradients(case, clean)[1]) > 0.01
    before = bits(case.model)
    result = taken(case, rival(case, "sam", rho=RHO))
    assert distance(result, expected) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in bits(case.model).items())


def test_sam_ascends_along_the_sum_of_the_accumulated_gradients() -> None:
    case = toy_case()
    micros = [Micro(case, slot=slot, share=0.5) for slot in range(2)]
    result = taken(case, rival(case, "sam", rho=RHO), micros)
    again = toy_case()
    assert distance(result, taken(again, rival(again, "sam", rho=RHO))) < 1e-5
    assert [micro.passes for micro in micros] == [2, 2]


def test_sam_without_a_radius_is_plain_lora_bit_for_bit() -> None:
    case, plain = toy_case(), toy_case()
    ours, expected = taken(case, rival(case, "sam", rho=0.0)), taken(plain, rival(plain, "lora"))
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_sam_shares_the_gradients_of_a_step_that_cannot_ascend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose gradients alone are finite would take a step that the others leave out."""
    case, shared = toy_case(), []
    monkeypatch.setattr(sam, "average", lambda tensors: shared.append(list(tensors)))
    rival(case, "sam", rho=RHO).compute(1, [Micro(case, share=float("inf"))])
    (of_trained,) = shared
    trained = [tensor.grad for tensor in case.model.parameters() if tensor.requires_grad]
    assert [tensor.data_ptr() for tensor in of_trained] == [
        tensor.data_ptr() for tensor in trained if tensor is not None
    ]


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_sam_is_the_same_with_gradient_checkpointing(denoiser: str) -> None:
    case = DENOISERS[denoiser]()
    case.model.train()
    gradient = rival(case, "sam", rho=RHO)
    expected = taken(case, gradient)
    case.model.enable_gradient_checkpointing()
    assert distance(taken(case, gradient), expected) < 1e-5


def test_sam_reads_the_weight_gradients_under_autocast() -> None:
    case = toy_case()
    expected = taken(case, rival(case, "sam", rho=RHO))
    other = toy_case()

    class Autocast(Micro):
        def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().backward(weight, is_shared)

    assert distance(taken(other, rival(other, "sam", rho=RHO), [Autocast(other)]), expected) < 0.05


def test_lora_sam_takes_the_gradient_where_a_and_b_have_ascended_by_rho() -> None:
    case = toy_case()
    by_hand = copy.deepcopy(case.model)
    steps = to_radius(loss_and_gradients(case, by_hand)[1])
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            if name in steps:
                parameter += steps[name]
    expected = loss_and_gradients(case, by_hand)[1]
    before = bits(case.model)
    assert distance(taken(case, rival(case, "lora-sam", rho=RHO)), expected) < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in bits(case.model).items())


def test_the_noise_of_a_step_is_drawn_once_for_all_its_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    case = toy_case()
    alone = taken(case, whole := rival(case, "flat-lora", sigma=0.5, perturb_per="step"))
    whole.detach()
    case.model.zero_grad()
    draw = Mock(side_effect=FlatLora._make_draw)
    monkeypatch.setattr(FlatLora, "_make_draw", lambda self, *values: draw(self, *values))
    shares = [Micro(case, slot, share=0.25) for slot in range(4)]
    gradients_of_shares = taken(case, rival(case, "flat-lora", sigma=0.5, perturb_per="step"), shares)
    assert draw.call_count == 1
    assert [share.passes for share in shares] == [1] * 4
    for name, gradient in gradients_of_shares.items():
        torch.testing.assert_close(gradient, alone[name])


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_bi_lora_takes_the_gradient_at_w_plus_the_adversarial_lora_clipped_to_rho(build: Any) -> None:
    case = build()
    clean = copy.deepcopy(case.model)
    gradient = rival(case, "bi-lora", rho=RHO)
    assert isinstance(gradient, BiLora)
    first = taken(case, gradient)
    assert distance(first, loss_and_gradients(case, clean)[1]) < 1e-6, "it starts at zero"
    for _ in range(3):
        gradient.compute(1, [Micro(case)])
        case.model.zero_grad(set_to_none=True)
        gradient.after_update(learning_rate=0.05, loss_scale=1.0)
    assert gradient.norm() == pytest.approx(RHO, rel=1e-4)
    eps = {
        layer.name: (gradient._scales[layer] * (up @ down)).detach().view(layer.shape)
        for layer, (down, up) in gradient._pairs.items()
    }
    loss, expected = loss_and_gradients(case, add_to_base(copy.deepcopy(clean), eps))
    assert distance(taken(case, gradient), expected) < 1e-4
    assert loss > case.loss(clean), "what ascends must raise the loss"
    with torch.no_grad():  # and nothing of it is there outside of a step
        assert torch.equal(case.predict(case.model), case.predict(clean))


def test_the_adversarial_lora_skips_a_step_whose_gradient_is_not_finite() -> None:
    """The scaler of fp16 looks at the gradients of A and B alone, which may be finite where these are not."""
    case = toy_case()
    gradient: Any = rival(case, "bi-lora", rho=RHO)

    def moves(spoiled: float | None = None) -> bool:
        before = {name: value.clone() for name, value in gradient.state()[0].items()}
        gradient.compute(1, [Micro(case)])
        if spoiled is not None:
            gradient._parameters()[-1].grad.view(-1)[0] = spoiled
        gradient.after_update(learning_rate=0.05, loss_scale=2.0)
        after = gradient.state()[0]
        assert all(bool(value.isfinite().all()) for value in after.values())
        return not all(torch.equal(value, before[name]) for name, value in after.items() if name in before)

    assert moves()
    for spoiled in (float("inf"), float("nan")):
        assert not moves(spoiled)
    assert moves(), "and goes on with the next"


def test_nbar_multiplies_a_and_b_by_the_larger_gradient() -> None:
    case = toy_case()
    gradient = rival(case, "nbar", bar_strength=2.0)
    gradient.compute(5, [Micro(case)])
    before = bits(case.model)
    gradient.before_update(5, learning_rate=0.01)  # half of the 10 steps are over, so the cosine is at a half
    after = dict(case.model.named_parameters())
    for name, down in after.items():
        if ".lora_A." not in name:
            continue
        up = after[name.replace("lora_A", "lora_B")]
        assert down.grad is not None
        assert up.grad is not None
        old_down, old_up = before[name], before[name.replace("lora_A", "lora_B")]
        grows = 1 if down.grad.norm() >= up.grad.norm() else -1
        torch.testing.assert_close(down, old_down * (1 + 0.01 * grows))
        torch.testing.assert_close(up, old_up * (1 - 0.01 * grows))


@pytest.mark.parametrize("method", ["sam", "lora-sam", "bi-lora", "nbar", "flat-lora", "lora"])
def test_a_detached_method_leaves_the_model_as_it_was(method: str) -> None:
    case = toy_case()
    plain = loss_and_gradients(case)[1]
    gradient = rival(case, method)
    gradient.compute(1, [Micro(case)])
    case.model.zero_grad(set_to_none=True)
    gradient.detach()
    after = loss_and_gradients(case)[1]
    assert all(torch.equal(after[name], plain[name]) for name in plain)
    assert not any("forward" in layer.get_base_layer().__dict__ for layer in lora_layers(case.model).values())


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("iterations", [0, 4], ids=["exact", "fast"])
def test_pissa_starts_at_the_largest_directions_of_w_and_leaves_w(denoiser: str, iterations: int) -> None:
    case = DENOISERS[denoiser]()
    before = bits(case.model)
    start_pissa(case.model, case.model.peft_config[ADAPTER], pissa(iterations), seed=0)
    for name, layer in lora_layers(case.model).items():
        weight = layer.get_base_layer().weight
        assert torch.equal(weight, before[f"{name}.base_layer.weight"])
        left, values, right = torch.linalg.svd(weight)
        rank = layer.r[ADAPTER]
        largest, delta = left[:, :rank] * values[:rank] @ right[:rank], layer.get_delta_weight(ADAPTER)
        if iterations:
            assert delta.norm() > 0.95 * largest.norm()
        else:
            torch.testing.assert_close(delta, largest, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged_weight(layer), weight, rtol=1e-4, atol=1e-5)
        assert not any(sides[ANCHOR].weight.requires_grad for sides in (layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("denoiser", DENOISERS)
@pytest.mark.parametrize("adapter", ["pissa", "lora-ga"])
def test_eps_of_pissa_has_the_filter_norms_of_the_merged_weight_and_the_gradient_of_the_reference(
    denoiser: str, adapter: str, draw: str
) -> None:
    case = DENOISERS[denoiser]()
    if adapter == "pissa":
        start_pissa(case.model, case.model.peft_config[ADAPTER], pissa(4), seed=0)
    else:
        slopes = slopes_of_weights(case, copy.deepcopy(case.model))
        add_anchor(case.model, case.model.peft_config[ADAPTER])
        start_at_gradients(case.model, slopes, seed=0)
    with torch.no_grad():  # a few steps away from its start
        for layer in lora_layers(case.model).values():
            layer.lora_B[ADAPTER].weight += 0.1 * normal(7, *layer.lora_B[ADAPTER].weight.shape)
    clean = copy.deepcopy(case.model)
    flat = FlatLora(case.model, sigma=0.1, schedule="constant")
    for name, layer in lora_layers(clean).items():
        expected = merged_weight(layer).flatten(1).norm(dim=1)
        torch.testing.assert_close(flat.filter_norms(name), expected, rtol=1e-4, atol=1e-5)
    by_hand = loss_and_gradients(case, add_to_base(copy.deepcopy(clean), all_noise(flat, step=1)))[1]
    assert distance(by_hand, loss_and_gradients(case, clean)[1]) > 0.01
    with flat.perturb(step=1):
        result = loss_and_gradients(case)[1]
    assert distance(result, by_hand) < 1e-4


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_lora_ga_starts_at_the_directions_of_the_gradients_and_keeps_the_output(denoiser: str) -> None:
    case = DENOISERS[denoiser]()
    for layer in lora_layers(case.model).values():  # as a LoRA begins
        layer.lora_B[ADAPTER].weight.data.zero_()
    clean = copy.deepcopy(case.model)
    slopes = slopes_of_weights(case, copy.deepcopy(clean))
    halves = [Micro(case, share=0.5), Micro(case, share=0.5)]
    read = dict(zip(lora_layers(case.model), read_weight_gradients([case.model], halves), strict=True))
    assert distance(read, slopes) < 1e-4
    before = bits(case.model)
    add_anchor(case.model, case.model.peft_config[ADAPTER])
    start_at_gradients(case.model, read, seed=0)
    for name, layer in lora_layers(case.model).items():
        assert torch.equal(layer.get_base_layer().weight, before[f"{name}.base_layer.weight"])
        rows = torch.linalg.svd(slopes[name])[2][: layer.r[ADAPTER]]  # of the gradient, which A spans
        down = layer.lora_A[ADAPTER].weight
        assert (down @ rows.T @ rows - down).norm() < 0.2 * down.norm(), name
        torch.testing.assert_close(merged_weight(layer), layer.get_base_layer().weight, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(case.predict(case.model), case.predict(clean), rtol=1e-4, atol=1e-4)
