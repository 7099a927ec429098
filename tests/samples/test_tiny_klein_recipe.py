"""The recipe of the tiny klein base: what it trains is what Flux2KleinPipeline runs, VAE and text encoder included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
from torch import Tensor
from transformers import Qwen2TokenizerFast

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.storage.rng import generator
from samples.tiny_klein.recipe import training
from samples.tiny_klein.recipe.base import Base, build_vae
from samples.tiny_klein.recipe.text import deepen, embeddings, tokenize, train_tokenizer
from samples.tiny_klein.recipe.training import normalize, optimizers, save_base, train_base
from samples.tiny_sdxl.recipe.icons import Concept
from samples.tiny_sdxl.recipe.loop import Schedule
from samples.tiny_sdxl.recipe.unet import VARIANTS, Data, Picture

FOX = Concept("1F98A", "fox", ("animal", "face", "wild"), 3, "animal-mammal", 1, 3.0, {}, None)
ANT = Concept("1F41C", "ant", (), 3, "animal-bug", 2, 1.0, {}, None)
TEXTS = ["a flat icon of a fox", "", "ant, in the style of zqxwvk 日本"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Qwen2TokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([FOX, ANT], folder)
    return Qwen2TokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def base() -> Base:
    """The base with random weights, in its output too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Base().eval()
        for name, weight in base.transformer.named_parameters():
            if "modulation" in name or "_out.linear" in name or "proj_out" in name:
                torch.nn.init.normal_(weight, std=0.05)
    return base


@pytest.fixture(scope="module")
def pipeline(base: Base, tokenizer: Qwen2TokenizerFast) -> Flux2KleinPipeline:
    vae = build_vae(SAMPLES / "tiny_sdxl")
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    found = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=deepen(base.text_encoder),
        tokenizer=tokenizer,
        transformer=base.transformer,
    )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("length", [32, 512])
@torch.no_grad()
def test_the_deep_text_encoder_gives_the_pipeline_the_embeddings_that_are_trained(
    base: Base, pipeline: Flux2KleinPipeline, tokenizer: Qwen2TokenizerFast, length: int
) -> None:
    asked = {} if length == 512 else {"max_sequence_length": length}
    expected, _ = pipeline.encode_prompt(TEXTS, **asked)
    found = embeddings(base.text_encoder, *tokenize(tokenizer, TEXTS, length))
    torch.testing.assert_close(found, expected)
    assert len({tuple(row.flatten().tolist()) for row in found}) == len(TEXTS)


@torch.no_grad()
def test_a_step_of_the_pipeline_subtracts_the_velocity_that_is_trained(
    base: Base, pipeline: Flux2KleinPipeline, tokenizer: Qwen2TokenizerFast
) -> None:
    noise = torch.randn(3, 16, 8, 8, generator=generator("cpu", 0, "noise"))
    drawn = pipeline(
        prompt=TEXTS,
        latents=noise,
        height=64,
        width=64,
        num_inference_steps=1,
        guidance_scale=1.0,
        max_sequence_length=32,
        output_type="latent",
    ).images
    velocity = base(*tokenize(tokenizer, TEXTS, 32), noise, torch.ones(3))
    assert velocity.std() > 0.1
    std = torch.sqrt(pipeline.vae.bn.running_var + pipeline.vae.bn.eps)[:, None, None]
    expected = (noise - velocity) * std + pipeline.vae.bn.running_mean[:, None, None]
    torch.testing.assert_close(drawn, Flux2KleinPipeline._unpatchify_latents(expected), rtol=1e-4, atol=1e-4)


def test_any_text_is_spelled_and_comes_back(tokenizer: Qwen2TokenizerFast) -> None:
    for text in ("zqxwvk TOK 日本 🦊", "It's a fox, 12 cafés"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@torch.no_grad()
def test_the_vae_is_that_of_tiny_sdxl(pipeline: Flux2KleinPipeline) -> None:
    source = AutoencoderKL.from_pretrained(SAMPLES / "tiny_sdxl", subfolder="vae", dtype=torch.float32)
    pixels = torch.rand(2, 3, 64, 64, generator=generator("cpu", 0, "pixels")) * 2 - 1
    latents = source.encode(pixels).latent_dist.mode()
    assert torch.equal(pipeline.vae.encode(pixels).latent_dist.mode(), latents)
    assert torch.equal(pipeline.vae.decode(latents).sample, source.decode(latents).sample)


def test_latents_are_normalized_as_the_pipeline_normalizes_images(pipeline: Flux2KleinPipeline) -> None:
    vae = build_vae(SAMPLES / "tiny_sdxl")
    pixels = torch.rand(6, 3, 64, 64, generator=generator("cpu", 0, "pixels")) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode().unflatten(0, (2, 3))
    found = normalize(vae, latents)
    expected = [
        Flux2KleinPipeline._encode_vae_image(_WithVae(vae), pixels[place : place + 1], None) for place in range(6)
    ]
    torch.testing.assert_close(found.flatten(0, 1), torch.cat(expected).detach(), rtol=1e-4, atol=1e-4)
    assert found.mean(dim=(0, 1, 3, 4)).abs().max() < 1e-3
    torch.testing.assert_close(found.std(dim=(0, 1, 3, 4)), torch.ones(16), rtol=1e-2, atol=1e-2)


class _WithVae:
    """As much of the pipeline as encodes an image."""

    _patchify_latents = staticmethod(Flux2KleinPipeline._patchify_latents)

    def __init__(self, vae: AutoencoderKLFlux2) -> None:
        self.vae = vae


def test_each_parameter_has_one_optimizer() -> None:
    with torch.random.fork_rng():
        base = Base()
    given = [p for o in optimizers(base, Schedule(1, 0.1)) for group in o.param_groups for p in group["params"]]
    assert len(given) == len({id(p) for p in given})
    assert {id(p) for p in given} == {id(p) for p in base.parameters()}


def test_a_trained_base_is_saved_whole_and_in_bf16(
    tmp_path: Path, tokenizer: Qwen2TokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "BATCH", 2)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)  # takes a minute
    drawn: list[Tensor] = []
    monkeypatch.setattr(Base, "forward", _noting(drawn))
    data = Data(torch.zeros(2, VARIANTS, 16, 8, 8), [Picture(FOX, "noto", 2.0), Picture(ANT, "fxemoji", 1.0)])
    with torch.random.fork_rng():
        trained = train_base(data, tokenizer, Schedule(3, 1e-3, warmup=1), tmp_path / "base.safetensors")
    assert len(drawn) == 3
    save_base(trained, build_vae(SAMPLES / "tiny_sdxl"), tokenizer, tmp_path / "base")
    loaded = Flux2KleinPipeline.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    assert torch.equal(loaded.transformer.proj_out.weight, trained.transformer.proj_out.weight)
    assert loaded.transformer.proj_out.weight.count_nonzero() > 0
    assert not loaded.config.is_distilled
    assert loaded.tokenizer.model_max_length == training.PADDED


def _noting(drawn: list[Tensor]) -> object:
    forward = Base.forward

    def noted(self: Base, *inputs: Tensor) -> Tensor:
        drawn.append(inputs[3])
        return forward(self, *inputs)

    return noted
