"""Flatness of toys with known answers: noise, loss increases, eigenvalues, traces and surfaces."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from flatlora_diffusion.flatness.curvature import top_eigenvalues, trace
from flatlora_diffusion.flatness.functional import (
    Estimate,
    Loss,
    Metric,
    Weights,
    gradient,
    hessian_vector,
    noise,
    scales,
    shifted,
    size,
    value,
)
from flatlora_diffusion.flatness.landscape import (
    axis,
    direction,
    expected_increase,
    loss_slice,
    loss_surface,
    worst_increases,
)
from flatlora_diffusion.flatness.merged_weights import Delta, loss_of_factors
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.storage.rng import FLATNESS


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quadratic(curvatures: Weights, centre: Weights) -> Loss:
    """sum of c (w - centre)^2 / 2 with a part for each layer."""

    def part(name: str, weights: Weights) -> Tensor:
        return (curvatures[name] * (weights[name] - centre[name]).square()).sum() / 2

    return [partial(part, name) for name in curvatures]


@pytest.fixture
def weights() -> Weights:
    return {"a.weight": normal(3, 5, seed=1), "b.weight": normal(4, 2, 3, 3, seed=2) * 3}


@pytest.fixture
def curvatures(weights: Weights) -> Weights:
    return {name: normal(*weight.shape, seed=3).abs() for name, weight in weights.items()}


def network(weights: Weights, scale: float = 1.0) -> tuple[Loss, Weights]:
    """A ReLU net's loss in two parts, and its weights with the layers scaled by c and 1/c: the same function."""
    x, y = normal(12, 4, seed=5), normal(12, 2, seed=6)

    def part(rows: slice, now: Weights) -> Tensor:
        hidden = torch.relu(x[rows] @ now["one.weight"].T)
        return ((hidden @ now["two.weight"].T - y[rows]).square().sum()) / 12

    scaled = {"one.weight": weights["one.weight"] * scale, "two.weight": weights["two.weight"] / scale}
    return [partial(part, slice(0, 7)), partial(part, slice(7, 12))], scaled


@pytest.fixture
def layers() -> Weights:
    return {"one.weight": normal(3, 4, seed=7), "two.weight": normal(2, 3, seed=8)}


def exact_hessian(loss: Loss, weights: Weights, metric: Metric) -> Tensor:
    """S H S as a matrix, by autograd."""
    shapes = {name: weight.shape for name, weight in weights.items()}

    def whole(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        now = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return torch.stack([part(now) for part in loss]).sum()

    hessian = torch.autograd.functional.hessian(whole, torch.cat([weight.flatten() for weight in weights.values()]))
    scale = scales(weights, metric)
    unit = torch.cat([scale[name].expand_as(weight).flatten() for name, weight in weights.items()])
    assert isinstance(hessian, Tensor)
    return unit[:, None] * hessian * unit


def test_noise_has_one_z_for_all_loras_and_the_radius_of_eq_7(weights: Weights) -> None:
    other = {name: weight * 2 + 1 for name, weight in weights.items()}
    one, two = (scales(result, "filter") for result in (weights, other))
    for name, eps in noise(one, weights, seed=4, draw=2).items():
        z = eps / one[name]
        torch.testing.assert_close(z, noise(two, other, seed=4, draw=2)[name] / two[name], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(z, noise(one, weights, seed=4, draw=3)[name] / one[name])
        assert not torch.allclose(z, noise(one, weights, seed=5, draw=2)[name] / one[name])
    wide = {"w": normal(2, 100_000) * torch.tensor([[1.0], [7.0]])}
    norms = noise(scales(wide, "filter"), wide, 0, 0)["w"].norm(dim=1)
    torch.testing.assert_close(norms.double(), wide["w"].norm(dim=1), rtol=0.02, atol=0)


def test_iid_noise_has_one_std_for_a_layer_and_the_same_energy(weights: Weights) -> None:
    filters, iid = scales(weights, "filter"), scales(weights, "iid")
    for name, weight in weights.items():
        inputs = weight[0].numel()
        assert len(set(iid[name].flatten().tolist())) == 1
        assert float(iid[name].square().sum() * inputs) == pytest.approx(float(weight.square().sum()))
        assert float(filters[name].square().sum() * inputs) == pytest.approx(float(weight.square().sum()))


def test_noise_has_the_law_of_training_and_none_of_its_draws() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), _lora())
    trained = FlatLora(model, sigma=0.1, schedule="constant", seed=9, draw="full")
    actual = {name: trained.noise(name, step=3) for name in trained.layers}
    trained.detach()
    flat = FlatLora(model, sigma=0.1, schedule="constant", seed=9, prefix=FLATNESS, draw="full")
    merged = {}
    for name, layer in flat.layers.items():
        base = layer.get_base_layer()
        assert isinstance(base, nn.Linear)
        merged[f"{name}.weight"] = (base.weight + layer.get_delta_weight("default")).detach()
    result = noise(scales(merged, "filter"), merged, seed=9, draw=3)
    for name in flat.layers:
        torch.testing.assert_close(result[f"{name}.weight"] * 0.1, flat.noise(name, step=3))
        assert not torch.allclose(result[f"{name}.weight"] * 0.1, actual[name])


def test_paired_differences_have_the_error_of_the_differences() -> None:
    difference = Estimate((1.0, 5.0, 3.0)).minus(Estimate((0.5, 4.5, 2.5)))
    assert (difference.mean, difference.error) == (0.5, 0.0)
    assert Estimate((1.0, 5.0, 3.0)).error == pytest.approx(2 / 3**0.5)


def test_no_noise_is_exactly_no_rise(layers: Weights) -> None:
    loss, weights = network(layers)
    assert expected_increase(loss, weights, 0.0, 3, seed=0) == Estimate((0.0, 0.0, 0.0))
    assert worst_increases(loss, weights, [0.0]) == [0.0]


@pytest.mark.parametrize("kind", ["filter", "iid"])
def test_rise_of_a_quadratic_is_its_closed_form(kind: Metric, weights: Weights, curvatures: Weights) -> None:
    loss = quadratic(curvatures, {name: weight + 1 for name, weight in weights.items()})
    scale = scales(weights, kind)
    exact = sum(float((c * scale[name].square()).sum()) for name, c in curvatures.items()) * 0.3**2 / 2
    result = expected_increase(loss, weights, 0.3, 400, seed=0, kind="iid" if kind == "iid" else "filter")
    assert abs(result.mean - exact) < 4 * result.error
    assert result.error < 0.05 * exact


def test_the_worst_step_is_steepest_and_as_long_as_the_noise(weights: Weights, curvatures: Weights) -> None:
    loss = quadratic(curvatures, {name: weight + 1 for name, weight in weights.items()})
    scale, radius = scales(weights, "filter"), 1e-4
    slope = sum(float((scale[name] * g).square().sum()) for name, g in gradient(loss, weights).items()) ** 0.5
    (rise,) = worst_increases(loss, weights, [radius])
    assert rise == pytest.approx(radius * size(weights) ** 0.5 * slope, rel=1e-3)
    for radius in (0.01, 0.1, 0.5):
        assert worst_increases(loss, weights, [radius])[0] > expected_increase(loss, weights, radius, 50, seed=0).mean


def test_the_worst_step_of_a_and_b_is_that_along_their_own_gradients_as_long_as_their_rows() -> None:
    """Of a loss that is linear in W' = W + BA the rise is G . (B eps_A + eps_B A + eps_B eps_A), whatever W is."""
    base, slope = {"w": normal(4, 6)}, normal(4, 6, seed=1)
    down, up = normal(2, 6, seed=2), normal(4, 2, seed=3)
    linear: Loss = [lambda now: (slope * now["w"]).sum() / 3, lambda now: (slope * now["w"]).sum() * 2 / 3]
    loss, factors = loss_of_factors(linear, base, {"w": Delta(down, up)})
    assert value(loss, factors) == pytest.approx(float((slope * (base["w"] + up @ down)).sum()))
    of_down, of_up = down.norm(dim=1, keepdim=True) / 6**0.5, up.norm(dim=1, keepdim=True) / 2**0.5
    u_down, u_up = of_down * (up.T @ slope), of_up * (slope @ down.T)
    unit = ((2 * 6 + 4 * 2) / (u_down.square().sum() + u_up.square().sum())).sqrt()
    for radius, rise in zip((0.01, 0.5), worst_increases(loss, factors, (0.01, 0.5)), strict=True):
        eps_a, eps_b = radius * unit * of_down * u_down, radius * unit * of_up * u_up
        assert rise == pytest.approx(float((slope * (up @ eps_a + eps_b @ down + eps_b @ eps_a)).sum()))
        mean = ((eps_a / of_down).square().sum() + (eps_b / of_up).square().sum()) / (2 * 6 + 4 * 2)
        assert float(mean.sqrt()) == pytest.approx(radius), "the relative radius, over all entries of A and B"


def test_hessian_vector_product_is_exact_over_parts(layers: Weights) -> None:
    loss, weights = network(layers)
    vector = {name: normal(*weight.shape, seed=11) for name, weight in weights.items()}
    flat = torch.cat([part.flatten() for part in vector.values()])
    result = torch.cat([part.flatten() for part in hessian_vector(loss, weights, vector).values()])
    torch.testing.assert_close(result, exact_hessian(loss, weights, "raw") @ flat)


@pytest.mark.parametrize("metric", ["filter", "raw"])
def test_eigenvalues_and_trace_are_those_of_the_exact_hessian(metric: Metric, layers: Weights) -> None:
    loss, weights = network(layers)
    exact = exact_hessian(loss, weights, metric)
    expected = torch.linalg.eigvalsh(exact).flip(0)[:3].tolist()
    full = top_eigenvalues(loss, weights, metric, 3, iterations=30, seed=0)
    assert [result.value for result in full] == pytest.approx(expected, rel=1e-6)
    early = top_eigenvalues(loss, weights, metric, 1, iterations=6, seed=0)[0]
    assert abs(early.value - expected[0]) <= early.residual + 1e-9
    assert early.value == pytest.approx(expected[0], rel=0.05)
    estimate = trace(loss, weights, metric, 600, seed=0)
    assert abs(estimate.mean - float(exact.trace())) < 4 * estimate.error
    assert estimate.error < 0.2 * abs(float(exact.trace()))


def test_lanczos_stops_when_the_space_is_exhausted() -> None:
    weights = {"w": normal(2, 3)}
    loss = quadratic({"w": torch.ones(2, 3, dtype=torch.float64)}, weights)  # the identity: one step finds all
    assert top_eigenvalues(loss, weights, "raw", 3, 5, seed=0)[0].value == pytest.approx(1)


def test_a_linear_loss_has_no_curvature(weights: Weights) -> None:
    loss: Loss = [lambda now: now["a.weight"].sum()]
    assert trace(loss, weights, "raw", 2, seed=0) == Estimate((0.0, 0.0))
    assert top_eigenvalues(loss, weights, "raw", 1, 4, seed=0)[0].value == 0


def test_trace_predicts_the_rise_under_small_noise(layers: Weights) -> None:
    loss, weights = network(layers)
    predicted = 0.01**2 / 2 * float(exact_hessian(loss, weights, "filter").trace())
    result = expected_increase(loss, weights, 0.01, 300, seed=0)
    assert abs(result.mean - predicted) < 4 * result.error + 0.02 * abs(predicted)


def test_rescaled_layers_change_raw_curvature_only(layers: Weights) -> None:
    (loss, plain), (_, scaled) = network(layers), network(layers, scale=8.0)
    assert value(loss, scaled) == pytest.approx(value(loss, plain))
    measures = (
        lambda now: expected_increase(loss, now, 0.2, 5, seed=0).mean,
        lambda now: expected_increase(loss, now, 0.2, 5, seed=0, kind="iid").mean,
        lambda now: worst_increases(loss, now, [0.05])[0],
        lambda now: top_eigenvalues(loss, now, "filter", 1, 20, seed=0)[0].value,
        lambda now: trace(loss, now, "filter", 5, seed=0).mean,
        lambda now: loss_slice(loss, now, [0.3], 0, 0)[0],
        lambda now: loss_surface(loss, now, [0.2], 0)[0][0],
    )
    for measure in measures:
        assert measure(scaled) == pytest.approx(measure(plain), rel=1e-4)
    raw = [top_eigenvalues(loss, now, "raw", 1, 20, seed=0)[0].value for now in (plain, scaled)]
    assert raw[1] > 5 * raw[0]


def test_directions_are_shared_and_as_long_as_the_filters(weights: Weights) -> None:
    other = {name: weight * 5 for name, weight in weights.items()}
    for name, result in direction(weights, seed=1, index=0).items():
        torch.testing.assert_close(result.flatten(1).norm(dim=1), weights[name].flatten(1).norm(dim=1))
        torch.testing.assert_close(direction(other, seed=1, index=0)[name], result * 5)
        assert not torch.allclose(direction(weights, seed=1, index=1)[name], result)


def test_the_middle_of_surface_and_slice_is_the_clean_loss(layers: Weights) -> None:
    loss, weights = network(layers)
    at = axis(0.5, 5)
    assert at == [-0.5, -0.25, 0.0, 0.25, 0.5]
    surface = loss_surface(loss, weights, at, seed=0)
    assert surface[2][2] == value(loss, weights)
    assert loss_slice(loss, weights, at, seed=0, index=0) == pytest.approx(surface[2])
    assert loss_slice(loss, weights, at, seed=0, index=1) == pytest.approx([row[2] for row in surface])


def test_no_measure_writes_a_weight(layers: Weights) -> None:
    loss, weights = network(layers)
    before = {name: weight.clone() for name, weight in weights.items()}
    expected_increase(loss, weights, 0.2, 2, seed=0)
    worst_increases(loss, weights, [0.1])
    top_eigenvalues(loss, weights, "filter", 1, 4, seed=0)
    trace(loss, weights, "filter", 2, seed=0)
    loss_surface(loss, weights, [0.1], seed=0)
    assert all(torch.equal(weights[name], before[name]) for name in weights)
    assert shifted(weights, weights, 0.0)["one.weight"].equal(weights["one.weight"])


def _lora() -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=False)
