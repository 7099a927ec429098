"""The LoRA: made from a seed, fp32, and saved so that a stock pipeline applies exactly what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from tiny_runs import save_lora

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.lora import add_lora, trainable_parameters
from flatlora_diffusion.config import AdapterConfig, ModelConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.sampling import generate_images
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.storage.run_dir import LORA_FILE


def load(base: Path, dtype: torch.dtype = torch.float32) -> Sdxl:
    return load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), dtype)


def test_all_attention_projections_are_adapted_and_nothing_else_is_trained(base: Path) -> None:
    unet = load(base, torch.bfloat16).denoiser
    add_lora(unet, AdapterConfig(rank=3), seed=0)
    expected = {
        name for name, _ in load(base).denoiser.named_modules() if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    }
    assert set(lora_layers(unet)) == expected
    parameters = trainable_parameters(unet)
    assert len(parameters) == 2 * len(expected)
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in parameters.items())


def test_the_initialization_keeps_the_state_of_no_gpu_and_the_cpu_s(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Any = []
    real = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices=None: (asked.append(devices), real(devices))[1])
    before = torch.get_rng_state()
    add_lora(load(base).denoiser, AdapterConfig(rank=3), seed=0)
    assert asked == [[]]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_initialization_is_a_function_of_the_seed_with_b_zero(base: Path) -> None:
    def factors(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        unet = load(base).denoiser
        add_lora(unet, AdapterConfig(rank=16), seed)
        return [
            (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer in lora_layers(unet).values()
        ]

    torch.manual_seed(1)
    first = factors(0)
    torch.manual_seed(2)
    second, other = factors(0), factors(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    assert all(not b.any() for _, b in first)
    assert float(torch.cat([a.detach().flatten() for a, _ in first]).std()) == pytest.approx(1 / 16, rel=0.05)


@pytest.mark.parametrize("alpha", [4, 10.0])
def test_a_stock_pipeline_applies_what_was_trained(base: Path, icons: Path, tmp_path: Path, alpha: float) -> None:
    sdxl = load(base)
    plain = generate_images(sdxl, ["an icon"], [0], ImageSettings(32, 2))[0]
    add_lora(sdxl.denoiser, AdapterConfig(rank=4, lora_alpha=alpha), seed=0)
    for index, layer in enumerate(lora_layers(sdxl.denoiser).values()):
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(index)))
    probe = fixed_probe(sdxl, load_samples(icons).samples, 32, seed=0, draws=2)
    trained = probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe)
    save_lora(sdxl.pipeline, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]

    stock = StableDiffusionXLPipeline.from_pretrained(base)
    stock.load_lora_weights(tmp_path)
    assert probe_loss(stock.unet, SdxlObjective(sdxl.scheduler), probe) == pytest.approx(trained, rel=1e-4)
    stock.unload_lora_weights()
    assert probe_loss(stock.unet, SdxlObjective(sdxl.scheduler), probe) != pytest.approx(trained, rel=1e-3)
    changed = generate_images(sdxl, ["an icon"], [0], ImageSettings(32, 2))[0]
    assert changed.tobytes() != plain.tobytes()


def merged_away(unet: Any, expected: dict[str, torch.Tensor]) -> float:
    """||W' - expected|| / ||expected|| over all layers, with W' of each DoRA layer by its definition."""
    apart = size = 0.0
    for name, layer in lora_layers(unet).items():
        down, up = (side["default"].weight.detach().double().flatten(1) for side in (layer.lora_A, layer.lora_B))
        moved = layer.get_base_layer().weight.detach().double().flatten(1) + layer.scaling["default"] * (up @ down)
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().double().flatten()
        merged = (magnitude / moved.norm(dim=1))[:, None] * moved
        apart += float((merged - expected[name]).square().sum())
        size += float(expected[name].square().sum())
    return float((apart / size) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_dora_starts_at_its_half_precision_base(base: Path, dtype: torch.dtype) -> None:
    unet = load(base, dtype).denoiser
    add_lora(unet, AdapterConfig(use_dora=True, lora_target_modules="conv"), seed=0)
    layers = lora_layers(unet)
    weights = {name: layer.get_base_layer().weight.double().flatten(1) for name, layer in layers.items()}
    assert {layer.get_base_layer().weight.dtype for layer in layers.values()} == {dtype}
    assert merged_away(unet, weights) < 2e-7


def test_a_dora_computes_what_its_half_precision_base_computes_before_the_first_step(base: Path) -> None:
    unet = load(base, torch.bfloat16).denoiser
    add_lora(unet, AdapterConfig(use_dora=True, lora_target_modules="conv"), seed=0)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name, layer in lora_layers(unet).items():
            plain = layer.get_base_layer()
            shape = (2, plain.weight.shape[1], *[5] * (plain.weight.ndim - 2))
            inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
            assert torch.equal(layer(inputs), plain(inputs)), name
