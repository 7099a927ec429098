"""Comparable losses: repeatable, independent of dropout and training mode; loss increase under common draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lora_by_hand import WithoutFloat64

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.config import AdapterConfig, ModelConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.evaluation import probe as evaluation
from flatlora_diffusion.evaluation.probe import Probe, fixed_probe, loss_increases, probe_loss
from flatlora_diffusion.families.drawing import ImageSettings
from flatlora_diffusion.families.sampling import generate_images
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.families.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.method.flat_lora import FlatLora


@pytest.fixture
def sdxl(base: Path) -> Sdxl:
    sdxl = load_sdxl(ModelConfig(pretrained_model_name_or_path=str(base)), torch.device("cpu"), torch.float32)
    add_lora(sdxl.denoiser, AdapterConfig(lora_dropout=0.5), seed=0)
    for index, layer in enumerate(lora_layers(sdxl.denoiser).values()):
        rng = torch.Generator().manual_seed(index)
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=rng) * 0.3)
    return sdxl


@pytest.fixture
def probe(sdxl: Sdxl, icons: Path) -> Probe:
    return fixed_probe(sdxl, load_samples(icons).samples, 32, seed=0, draws=4)


def test_a_probe_has_stratified_timesteps_for_each_image(probe: Probe) -> None:
    strata = (probe.timesteps.view(3, 4) // 250).tolist()
    assert strata == [[0, 1, 2, 3]] * 3
    assert torch.equal(probe.batch.latents[0], probe.batch.latents[3])
    assert not torch.equal(probe.noise[0], probe.noise[1])


def test_probe_loss_is_repeatable_and_ignores_dropout_and_batching(sdxl: Sdxl, probe: Probe) -> None:
    sdxl.denoiser.train()
    first = probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe)
    assert probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe) == first
    assert probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe, batch_size=5) == pytest.approx(
        first, rel=1e-5
    )
    assert sdxl.denoiser.training, "the mode was not put back"
    sdxl.denoiser.disable_adapters()
    assert probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe) != pytest.approx(first, rel=1e-4)


def test_losses_are_averaged_on_a_device_without_float64(
    sdxl: Sdxl, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe)
    real = evaluation.sample_losses
    monkeypatch.setattr(evaluation, "sample_losses", lambda *args: real(*args).as_subclass(WithoutFloat64))
    assert probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe) == expected


def test_loss_rise_is_zero_without_noise_and_grows_with_sigma(sdxl: Sdxl, probe: Probe) -> None:
    def rises(sigma: float, seed: int = 0) -> list[float]:
        return loss_increases(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe, sigma, draws=3, seed=seed)

    assert rises(0.0) == [0.0, 0.0, 0.0]
    assert rises(0.1) == rises(0.1)
    assert rises(0.1) != rises(0.1, seed=1)
    assert len(set(rises(0.1))) == 3
    assert sum(abs(rise) for rise in rises(1.0)) > 3 * sum(abs(rise) for rise in rises(0.1))


def test_no_rise_is_measured_under_the_eps_of_training(sdxl: Sdxl, probe: Probe) -> None:
    objective = SdxlObjective(sdxl.scheduler)
    rises = loss_increases(sdxl.denoiser, objective, probe, 0.3, draws=2, seed=3)
    clean = probe_loss(sdxl.denoiser, objective, probe)
    flat = FlatLora(sdxl.denoiser, sigma=0.3, schedule="constant", seed=3, draw="full")
    for draw, rise in enumerate(rises):
        with flat.perturb(step=draw):
            assert probe_loss(sdxl.denoiser, objective, probe) - clean != pytest.approx(rise, rel=1e-3)


def test_an_image_depends_on_its_prompt_and_seed_alone(sdxl: Sdxl) -> None:
    def images(prompts: list[str], seeds: list[int], batch_size: int = 8) -> list[bytes]:
        made = generate_images(sdxl, prompts, seeds, ImageSettings(32, 2), batch_size)
        assert {image.size for image in made} == {(32, 32)}
        return [image.tobytes() for image in made]

    sdxl.denoiser.train()
    both = images(["a fox", "a cow"], [1, 2])
    assert sdxl.denoiser.training
    assert images(["a fox", "a cow"], [1, 2]) == both
    other = images(["a fox"], [2])[0]
    assert other != both[0]
    alone = torch.tensor(list(images(["a cow"], [2], batch_size=1)[0])).float()
    assert (alone - torch.tensor(list(both[1])).float()).abs().max() <= 1, "the batch changed an image"
