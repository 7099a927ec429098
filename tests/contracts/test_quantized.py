"""On a quantized frozen base eps acts on the dequantized W, and what is quantized is never written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_by_hand import add_to_base, all_noise, distance, lora_layers, merged_weight
from peft import inject_adapter_in_model
from tiny_models import (
    ATTENTION,
    DENOISERS,
    Adapter,
    Case,
    loss_and_gradients,
    randomize_adapters,
    seeded,
)
from torch import Tensor, nn

from flatlora_diffusion import FlatLora

PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao-int8": "torchao"}
UNET_LAYERS = (*ATTENTION, "ff.net.0.proj", "proj_in")


@pytest.fixture(params=PACKAGES)
def kind(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(PACKAGES[request.param])
    return request.param


def quantize(layer: nn.Linear, kind: str) -> nn.Linear:
    """`layer` as diffusers' loader quantizes it; for bitsandbytes that loader wants a GPU, its classes do not."""
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig())
        return layer
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    size, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
    quantized: Any
    if kind == "nf4":
        quantized = Linear4bit(*size, compute_dtype=weight.dtype, quant_type="nf4")
        quantized.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    else:
        quantized = Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)
        quantized.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    quantized.bias = layer.bias
    return quantized.to("cpu")


def dequantized(layer: nn.Linear) -> Tensor:
    """W as the layer's own forward computes with it."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features)).T - (0 if layer.bias is None else layer.bias[:, None])


def cases(kind: str, denoiser: str = "unet") -> tuple[Case, Case]:
    """A denoiser with quantized linear layers under LoRA, and its twin with their dequantized weights."""
    pattern = DENOISERS[denoiser]()
    models = []
    for _ in range(2):
        with seeded(0):
            model: Any = type(pattern.model).from_config(pattern.model.config)
        model.requires_grad_(False)
        models.append(model.train())
    quantized, plain = models
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            held = quantize(quantized.get_submodule(name), kind).train()
            setattr(quantized.get_submodule(parent), child, held)
            layer.weight.data = dequantized(held)
    quantized.is_loaded_in_4bit, quantized.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    config = Adapter().config(UNET_LAYERS) if denoiser == "unet" else pattern.model.peft_config["default"]
    for model in models:
        model.add_adapter(config)
        randomize_adapters(model)
    return Case(quantized, pattern.predict, pattern.target), Case(plain, pattern.predict, pattern.target)


def quantized_bytes(case: Case) -> dict[str, Tensor]:
    """What is stored of every adapted base layer: the quantized weight with its scales, and the bias."""
    stored: dict[str, Tensor] = {}
    for name, layer in lora_layers(case.model).items():
        for key, value in layer.get_base_layer().state_dict().items():
            parts = [key] if not hasattr(value, "qdata") else ["qdata", "scale"]
            stored |= {f"{name}.{key}.{part}": getattr(value, part, value).detach().clone() for part in parts}
    return stored


@pytest.mark.usefixtures("draw")
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_loss_and_gradients_are_those_of_the_dequantized_weights_plus_noise(kind: str, denoiser: str) -> None:
    case, plain = cases(kind, denoiser)
    flat = FlatLora(case.model, sigma=0.1, schedule="constant")
    assert len(flat.layers) == len(lora_layers(case.model)) > 15
    clean, clean_gradients = loss_and_gradients(plain)
    with flat.perturb(step=3):
        loss, gradients = loss_and_gradients(case)
    add_to_base(plain.model, all_noise(flat, step=3))
    expected_loss, expected = loss_and_gradients(plain)
    assert gradients.keys() == expected.keys()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert distance(gradients, expected) < 1e-3
    assert distance(clean_gradients, expected) > 0.05
    assert not torch.equal(clean, expected_loss)


def test_filter_norms_are_those_of_the_dequantized_weights_with_lora(kind: str) -> None:
    case, plain = cases(kind)
    expected = {"nf4": "Linear4bit", "int8": "Linear8bitLt", "torchao-int8": "TorchaoLoraLinear"}[kind]
    assert {type(layer).__name__ for layer in lora_layers(case.model).values()} == {expected}, "PEFT's own class"
    flat = FlatLora(case.model)
    for name, layer in lora_layers(plain.model).items():
        torch.testing.assert_close(flat.filter_norms(name), merged_weight(layer).norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.usefixtures("draw")
@pytest.mark.parametrize("denoiser", DENOISERS)
def test_the_quantized_weights_are_bit_identical_after_perturbed_steps(kind: str, denoiser: str) -> None:
    case, _ = cases(kind, denoiser)
    case.loss()  # bitsandbytes moves its scales at the first forward
    before = quantized_bytes(case)
    assert any(value.dtype in (torch.uint8, torch.int8) for value in before.values())
    flat = FlatLora(case.model, schedule="constant")
    trainable = [p for p in case.model.parameters() if p.requires_grad]
    lora = [p.detach().clone() for p in trainable]
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    for step in range(3):
        with flat.perturb(step=step):
            case.loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    after = quantized_bytes(case)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert torch.equal(after[name], value), name
    assert not any(torch.equal(a, b) for a, b in zip(lora, trainable, strict=True))


@pytest.mark.usefixtures("draw")
def test_a_step_dequantizes_no_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, _ = cases(kind)
    flat = FlatLora(case.model, schedule="constant")
    calls: list[nn.Module] = []
    monkeypatch.setattr("flatlora_diffusion.method.layers.dequantize_module_weight", calls.append)
    with flat.perturb(step=0):
        case.loss().backward()
    assert calls == []


def test_sigma_zero_and_a_detached_flat_lora_are_bit_equal_to_plain_lora(kind: str) -> None:
    case, _ = cases(kind)
    runs = [loss_and_gradients(case)]
    flat = FlatLora(case.model, sigma=0.0)
    with flat.perturb(step=7):
        runs.append(loss_and_gradients(case))
    flat.detach()
    runs.append(loss_and_gradients(case))
    for loss, gradients in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert all(torch.equal(gradients[name], value) for name, value in runs[0][1].items())


def test_norms_leave_a_half_precision_bias_as_it_is(kind: str) -> None:
    """bitsandbytes casts a bias in place to the dtype of the inputs; those for the norms must not change it."""
    layer = nn.Linear(24, 32).to(torch.bfloat16).requires_grad_(False)
    model: Any = nn.ModuleDict({"layer": quantize(layer, kind)})
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    inject_adapter_in_model(Adapter().config(("layer",)), model)
    randomize_adapters(model)
    flat = FlatLora(model, schedule="constant")
    assert (flat.filter_norms("layer") > 0).all()
    assert flat.layers["layer"].get_base_layer().bias.dtype == torch.bfloat16


@pytest.mark.usefixtures("draw")
def test_fp32_inputs_under_autocast_are_computed_and_differentiated_in_its_precision(kind: str) -> None:
    """CUDA's autocast runs LayerNorm in fp32, so the query's layer sees fp32; backward runs outside of autocast."""
    model: Any = nn.ModuleDict({"layer": quantize(nn.Linear(24, 32).requires_grad_(False), kind)})
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    inject_adapter_in_model(Adapter().config(("layer",)), model)
    randomize_adapters(model)
    flat = FlatLora(model, schedule="constant")
    x = torch.randn(4, 24, requires_grad=True)
    with flat.perturb(step=0):
        exact = model["layer"](x)
        (expected,) = torch.autograd.grad(exact.square().sum(), x)
        with torch.autocast("cpu", torch.bfloat16):
            output = model["layer"](x)
        (actual,) = torch.autograd.grad(output.float().square().sum(), x)
    torch.testing.assert_close(output.float(), exact, rtol=0.05, atol=0.05)
    assert distance({"x": actual}, {"x": expected}) < 0.05
