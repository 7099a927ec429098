"""In bf16, fp16 and under autocast, perturbed LoRA is as close to fp32 as plain LoRA is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lora_by_hand import add_to_base, all_noise, distance, gradients, lora_layers
from tiny_models import CASES, Adapter, Case, normal, toy_case
from tiny_runs import trained
from torch import Tensor, nn

from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import TrainConfig, for_method

pytestmark = pytest.mark.usefixtures("draw")

SIGMA = 0.1

LOW_PRECISION = {
    "bf16": (Adapter(dtype=torch.bfloat16), None),
    "fp16": (Adapter(dtype=torch.float16), None),
    "bf16 base, fp32 lora": (Adapter(dtype=torch.bfloat16, lora_dtype=torch.float32), None),
    "autocast bf16": (Adapter(), torch.bfloat16),
    "autocast fp16": (Adapter(), torch.float16),
    "bf16 base, fp32 lora, autocast": (Adapter(dtype=torch.bfloat16, lora_dtype=torch.float32), torch.bfloat16),
}
# A base in half precision and autocast from fp32 each have one of the two half precisions; the others are long.
SHORT = ("bf16", "autocast fp16", "bf16 base, fp32 lora, autocast")
PRECISIONS = [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in LOW_PRECISION if name not in SHORT)]


def run_low(case: Case, model: nn.Module, compute: torch.dtype | None) -> tuple[Tensor, dict[str, Tensor]]:
    """Prediction and gradients, with the forward under autocast to `compute` and the backward outside of it."""
    with torch.autocast("cpu", compute or torch.bfloat16, enabled=compute is not None):
        prediction = case.predict(model)
    nn.functional.mse_loss(prediction.float(), case.target).backward()
    return prediction.detach().float(), gradients(model)


def squared_distances(case: Case, low: tuple[Tensor, dict[str, Tensor]], exact: nn.Module) -> list[float]:
    """Squared relative distances to fp32, of the prediction and of all gradients."""
    output, slopes = run_low(case, exact, None)
    return [float((low[0] - output).norm() / output.norm()) ** 2, distance(low[1], slopes) ** 2]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("toy", 8),
        pytest.param("clip", 8, marks=pytest.mark.long),
        pytest.param("unet", 3, marks=pytest.mark.long),
        pytest.param("klein", 3, marks=pytest.mark.long),
    ],
)
def test_low_precision_is_no_further_from_fp32_than_plain_lora_is(name: str, models: int, precision: str) -> None:
    """At most 1.5 times plain LoRA's own distance; geometric mean over models, since one distance scatters by 30 %."""
    adapter, compute = LOW_PRECISION[precision]
    ratios = []
    for seed in range(models):
        case = CASES[name](adapter, seed=seed)
        exact = copy.deepcopy(case.model).float()
        plain = torch.tensor(squared_distances(case, run_low(case, case.model, compute), exact))
        assert (plain > 0).all()
        flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
        with flat.perturb(step=seed):
            low = run_low(case, case.model, compute)
        ours = squared_distances(case, low, add_to_base(exact, all_noise(flat, step=seed)))
        ratios.append((torch.tensor(ours) / plain).sqrt())
    ratio = torch.stack(ratios).log().mean(dim=0).exp()
    assert (ratio <= 1.5).all(), f"output and gradient distances are {ratio.tolist()} times those of plain LoRA"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_noise_is_not_lost_to_the_rounding_of_half_precision_weights(dtype: torch.dtype) -> None:
    """At the start of a ramp eps is below the spacing of bf16 around W: W + eps in bf16 would be 80 % off.

    The effective eps is the least squares fit to 8,192 tokens, which averages the rounding of the outputs away.
    """
    case = toy_case(Adapter(dtype=dtype))
    flat = FlatLora(case.model, sigma=0.004, schedule="constant")
    layer: Any = flat.layers["narrow"]
    inputs = normal(1, 8192, 40).to(dtype)
    with torch.no_grad():
        plain = layer(inputs).float()
        with flat.perturb(step=1):
            effect = layer(inputs).float() - plain
    fitted = torch.linalg.lstsq(inputs.float(), effect).solution.T
    expected = flat.noise("narrow", step=1).float()
    assert (fitted - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_layer_keeps_the_output_dtype_of_plain_lora(precision: str) -> None:
    adapter, compute = LOW_PRECISION[precision]
    case = CASES["unet_conv"](adapter)
    flat = FlatLora(case.model, sigma=SIGMA, schedule="constant")
    seen: dict[str, torch.dtype] = {}
    for name, layer in lora_layers(case.model).items():
        layer.register_forward_hook(lambda _m, _i, output, name=name: seen.__setitem__(name, output.dtype))
    run_low(case, case.model, compute)
    plain = dict(seen)
    seen.clear()
    with flat.perturb(step=0):
        run_low(case, case.model, compute)
    assert seen == plain


@pytest.mark.parametrize("method", ["lora-sam", "sam", pytest.param("flat-lora", marks=pytest.mark.long)])
def test_no_pass_takes_a_cast_of_weights_from_the_cache_of_another(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Autocast keeps its casts of A and B; SAM's second pass has other ones, and so has the next step."""
    config = config.replace(**for_method(method), mixed_precision="bf16")
    cached = trained(config, steps=2).trainable
    monkeypatch.setattr(torch, "is_autocast_cache_enabled", lambda: False)
    assert not torch.autocast("cpu")._cache_enabled
    for name, value in trained(config, steps=2).trainable.items():
        assert torch.equal(cached[name], value), name
