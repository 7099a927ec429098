"""The recipe of the tiny base: how captions condition it, how its training goes on, what it saves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTokenizer

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.tensor_io import load_tensors
from samples.tiny_sdxl.recipe.captions import DROPPED
from samples.tiny_sdxl.recipe.loop import Schedule, train
from samples.tiny_sdxl.recipe.unet import Base, load_base, save_base
from samples.tiny_sdxl.recipe.vae import build_vae

TINY = SAMPLES / "tiny_sdxl"
NAMES = ("tokenizer", "tokenizer_2")


@pytest.fixture(scope="module")
def untrained() -> Base:
    """The base with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Base().eval()


@torch.no_grad()
def test_captions_condition_the_unet_as_the_pipeline_does_and_dropped_ones_as_its_unconditional_half(
    untrained: Base,
) -> None:
    tokenizer, tokenizer_2 = (CLIPTokenizer.from_pretrained(TINY / name) for name in NAMES)
    pipeline = StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=untrained.text_encoder,
        text_encoder_2=untrained.text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=untrained.unet,
        scheduler=EulerDiscreteScheduler(),
    )
    text, dropped, pooled, dropped_pooled = pipeline.encode_prompt("a flat icon of a fox")
    assert torch.count_nonzero(dropped) == torch.count_nonzero(dropped_pooled) == 0

    given: list[Any] = []
    hook = untrained.unet.register_forward_pre_hook(
        lambda _, args, kwargs: given.extend((args, kwargs)), with_kwargs=True
    )
    texts = ["a flat icon of a fox", DROPPED]
    ids, ids_2 = (one(texts, padding="max_length", return_tensors="pt").input_ids for one in (tokenizer, tokenizer_2))
    untrained(
        ids, ids_2, torch.tensor([1.0, 0.0]), torch.zeros(2, 4, 16, 16), torch.tensor([500, 500]), torch.zeros(2, 6)
    )
    hook.remove()
    (_, _, prompt_embeds), added = given[0], given[1]["added_cond_kwargs"]
    torch.testing.assert_close(prompt_embeds[:1], text)
    torch.testing.assert_close(added["text_embeds"][:1], pooled)
    assert torch.equal(prompt_embeds[1:], dropped)
    assert torch.equal(added["text_embeds"][1:], dropped_pooled)


def test_a_saved_base_is_trained_on_from_its_own_weights() -> None:
    base, saved = load_base(TINY), StableDiffusionXLPipeline.from_pretrained(TINY, dtype=torch.float32)
    for name, part in base.named_children():
        for key, value in getattr(saved, name).state_dict().items():
            assert torch.equal(part.state_dict()[key], value), f"{name}.{key}"
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in base.parameters())


def noisy_regression(model: nn.Module, killed_at: int | None = None) -> Callable[[int], Tensor]:
    def loss_at(step: int) -> Tensor:
        if step == killed_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 3, generator=generator("cpu", 0, "x", step))
        return (model(x) - x.sum(dim=1, keepdim=True)).square().mean()

    return loss_at


def linear(seed: int) -> nn.Linear:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator("cpu", seed, "linear")))
    return model


def test_a_killed_run_goes_on_and_ends_bit_equal_to_an_unbroken_one(tmp_path: Path) -> None:
    schedule = Schedule(steps=12, learning_rate=0.1, warmup=4, save_seconds=0)
    unbroken, killed, resumed = linear(0), linear(0), linear(1)
    train(unbroken, noisy_regression(unbroken), schedule, tmp_path / "unbroken.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train(killed, noisy_regression(killed, killed_at=7), schedule, tmp_path / "killed.safetensors")
    assert load_tensors(tmp_path / "killed.safetensors")[1]["step"] == 7
    train(resumed, noisy_regression(resumed), schedule, tmp_path / "killed.safetensors")
    for one, two in zip(resumed.parameters(), unbroken.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_saved_base_keeps_its_vae_and_does_not_name_the_folder_it_was_built_in(tmp_path: Path) -> None:
    for name in NAMES:
        shutil.copytree(TINY / name, tmp_path / name)
    build_vae().half().save_pretrained(tmp_path / "vae")
    (weights,) = (tmp_path / "vae").glob("*.safetensors")
    before = weights.read_bytes()
    save_base(Base(), tmp_path)
    assert weights.read_bytes() == before
    assert (tmp_path / "unet" / "config.json").is_file()
    for file in tmp_path.rglob("*.json"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8"), file
