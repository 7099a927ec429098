"""What Flat-LoRA's paper (arXiv:2409.14396) proves of itself and of its rivals holds for what is shipped.

Eq. 3 and 4: moving A and B moves W' = W + sBA, but only inside of what A and B span. Proposition 3.2 and Lemma 3.1:
what eps does to activations and to the loss. With G = dL/dW', for any steps of A and B and for those of SAM over both:

    eps_W = s (B eps_A + eps_B A + eps_B eps_A),    dL/dA = s B^T G,    dL/dB = s G A^T
    eps_W = c s^2 (B B^T G + G A^T A) + c^2 s^3 G A^T B^T G,    c = rho / ||(dL/dA, dL/dB)||

While B is small, what is left of it is s eps_B A = c s^2 G A^T A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lora_by_hand import lora_layers, merged_weight
from peft import LoraConfig, get_peft_model
from tiny_models import Case, normal, seeded, spread_row_norms, toy_case
from torch import Tensor, nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import DrawKind
from flatlora_diffusion.method.draw import DRAW_RANK
from flatlora_diffusion.method.rivals.sam import LoraSam
from flatlora_diffusion.method.rivals.weight_gradients import read_weight_gradients

RHO = 0.5
ERRORS = 5  # how many standard errors a mean may be off


@dataclass
class Watched:
    """A step on the case's one batch that notes each layer's W' at every pass."""

    case: Case
    slot: int = 0
    seen: list[dict[str, Tensor]] = field(default_factory=list)

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        self.seen.append(merged(self.case))
        loss = self.case.loss()
        (loss * weight).backward()
        return loss.detach()


def merged(case: Case) -> dict[str, Tensor]:
    """W' of each layer as a matrix, (m, n)."""
    return {name: merged_weight(layer).flatten(1) for name, layer in lora_layers(case.model).items()}


def factors(case: Case) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    return {
        name: (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for name, layer in lora_layers(case.model).items()
    }


def matrices(*tensors: Any) -> list[Tensor]:
    return [tensor.detach().flatten(1) for tensor in tensors]


def scale(case: Case, name: str) -> float:
    layer = lora_layers(case.model)[name]
    return float(layer.lora_alpha["default"] / layer.r["default"])


def slopes(case: Case) -> dict[str, Tensor]:
    """G of each layer, (m, n); A and B have their gradients afterwards."""
    gradients = read_weight_gradients([case.model], [Watched(case)])
    return {name: gradient.flatten(1) for name, gradient in zip(lora_layers(case.model), gradients, strict=True)}


def ascent(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """eps_W of a step of SAM over A and B as it acts, G at the weights, and c."""
    gradients = slopes(case)
    parameters = [parameter for parameter in case.model.parameters() if parameter.requires_grad]
    size = torch.stack([parameter.grad.norm() for parameter in parameters if parameter.grad is not None]).norm()
    case.model.zero_grad(set_to_none=True)
    watched = Watched(case)
    LoraSam(parameters, parameters, RHO).compute(0, [watched])
    first, second = watched.seen
    return {name: second[name] - first[name] for name in first}, gradients, RHO / float(size)


def test_sam_over_a_and_b_perturbs_w_prime_by_its_gradient_through_both() -> None:
    case = toy_case()
    eps, gradients, c = ascent(case)
    for name, (down, up) in factors(case).items():
        (a, b), g, s = matrices(down, up), gradients[name], scale(case, name)
        whole = c * s**2 * (b @ b.mT @ g + g @ a.mT @ a) + c**2 * s**3 * g @ a.mT @ b.mT @ g
        assert (eps[name] - whole).norm() < 1e-3 * whole.norm(), name


def test_while_b_is_zero_sam_over_a_and_b_reaches_the_row_space_of_a_alone() -> None:
    case = toy_case()
    for _, up in factors(case).values():
        up.data.zero_()
    eps, gradients, c = ascent(case)
    for name, (down, _) in factors(case).items():
        (a,), g = matrices(down), gradients[name]
        torch.testing.assert_close(eps[name], c * scale(case, name) ** 2 * g @ a.mT @ a, rtol=1e-3, atol=1e-5)
        inside = torch.linalg.pinv(a) @ a
        assert (eps[name] - eps[name] @ inside).norm() < 1e-3 * eps[name].norm()
        assert (g @ inside).norm() < 0.9 * g.norm(), "here the steepest way in W' itself lies there too"


@pytest.mark.parametrize("width", [64, 1024, *(pytest.param(width, marks=pytest.mark.long) for width in (256, 4096))])
@pytest.mark.parametrize(("draw", "draws"), [("full", 400), ("low_rank", 2000)])
def test_the_variance_that_eps_adds_to_activations_is_the_same_at_every_width(
    draw: DrawKind, draws: int, width: int
) -> None:
    """Proposition 3.2: eps makes the variance of activations (1 + sigma^2) times as large, independent of the width n.

    For x of n independent entries of variance 1: var(W'_i x) = ||W'_i||^2, var(eps_i x) = sigma^2 ||W'_i||^2. The
    tolerance: over ||W'_i||, y_i = W'_i x has variance 1, and given x and, of a low-rank draw, V, z_i = eps_i x are
    independent normals of variance sigma^2 p. There p = ||x||^2 / n, times ||V^T x||^2 / (k ||x||^2) if low-rank, so
    E p = 1, E p^2 = (1 + 2/n)(1 + 2/k) (k infinite for `full`) and E y^2 p = 1 + 2/n. Of the mean over m rows of
    (y + z)^2 - y^2 the variance is E[4 sigma^2 y^2 p + 2 sigma^4 p^2] / m + sigma^4 var(p).
    """
    sigma, rows = 0.5, 64
    with seeded(0):
        base = nn.Sequential(nn.Linear(width, rows, bias=False))
        model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    spread_row_norms(model)
    flat = FlatLora(model, sigma=sigma, schedule="constant", draw=draw)
    norms = merged(Case(model, model, torch.zeros(0)))["0"].norm(dim=1)
    x = normal(1, draws, width)
    with torch.no_grad():
        y, noisy = model(x) / norms, torch.empty(draws, rows)
        for step in range(draws):
            with flat.perturb(step):
                noisy[step] = model(x[step : step + 1])[0] / norms
    added = (noisy.square() - y.square()).mean(dim=1).double()
    p_square = (1 + 2 / width) * (1 + (2 / DRAW_RANK if draw == "low_rank" else 0))
    variance = (4 * sigma**2 * (1 + 2 / width) + 2 * sigma**4 * p_square) / rows + sigma**4 * (p_square - 1)
    error = math.sqrt(variance / draws)
    assert error < 0.03 * sigma**2, "too coarse to tell"
    assert abs(float(added.mean()) - sigma**2) < ERRORS * error
    assert 0.8 < float(added.var()) / variance < 1.25, "the tolerance is not what this docstring derives"


ALPHA, BETA = 0.3, 1.0
SIGMAS = [0.1, 0.3, 1.0]  # alpha / sigma is above beta, at it, and below


def huber(y: Tensor) -> Tensor:
    """A loss whose slope is at most ALPHA and changes at most at the rate BETA."""
    return torch.where(y.abs() < ALPHA / BETA, BETA * y.square() / 2, ALPHA * y.abs() - ALPHA**2 / BETA / 2)


def smoothed_curvature(y: float, sigma: float) -> float:
    """The second derivative of E huber(y + sigma z): BETA times the chance that y + sigma z is in the middle part."""
    edge = ALPHA / BETA
    inside = [math.erf((side - y) / (sigma * math.sqrt(2))) for side in (edge, -edge)]
    return BETA * (inside[0] - inside[1]) / 2


@pytest.mark.parametrize("sigma", [0.3, *(pytest.param(one, marks=pytest.mark.long) for one in SIGMAS if one != 0.3)])
def test_flat_lora_trains_on_the_smoothed_loss_of_lemma_3_1(sigma: float) -> None:
    """W' = W + b x^T with W orthogonal to x, so that b and -b have one ||W'|| and so one std of eps x.

    With common draws a slope between the two is in [0, BETA], so its variance is at most mean * (BETA - mean).
    """
    width, step, draws = 16, 0.01, 1000
    x = torch.nn.functional.one_hot(torch.tensor([3]), width).float()
    with seeded(0):
        model: Any = get_peft_model(
            nn.Sequential(nn.Linear(width, 1, bias=False)), LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
        )
    layer = lora_layers(model)["0"]
    weight, down, up = layer.get_base_layer().weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight.data[:, 3] = 0
    weight.data *= width**0.5 / weight.data.norm()
    down.data.copy_(x)
    flat = FlatLora(model, sigma=sigma, schedule="constant", draw="full")

    def gradient(b: float) -> float:
        up.data.fill_(b)
        up.grad = None
        for draw in range(draws):
            with flat.perturb(draw):
                huber(model(x)).sum().backward()
        return float(up.grad) / draws

    slope = (gradient(step) - gradient(-step)) / (2 * step)
    exact = smoothed_curvature(0, sigma)
    error = math.sqrt(exact * (BETA - exact) / draws)
    assert abs(slope - exact) < ERRORS * error + 1e-3
    assert slope < min(ALPHA / sigma, BETA) + 1e-3
