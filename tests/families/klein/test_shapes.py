"""Sizes of FLUX.2 klein 4B without its weights, and a base of random weights in given shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_random_klein import save_tiny_random_klein

from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.families.klein.family import KleinFamily
from flatlora_diffusion.families.klein.labels import KLEIN_4B
from flatlora_diffusion.families.klein.random_base import random_klein

KLEIN = ModelConfig("black-forest-labs/FLUX.2-klein-base-4B")


def test_klein_4b_has_its_published_sizes() -> None:
    family = KleinFamily()
    counts = {
        part: sum(weight.numel() for weight in family.on_meta(KLEIN, part).parameters()) for part in family.parts
    }
    assert round(counts["transformer"] / 1e9, 2) == 3.88
    assert round(counts["text_encoder"] / 1e9, 1) == 4.0
    assert round(counts["vae"] / 1e6) == 84
    transformer = family.on_meta(KLEIN, "transformer")
    assert 3 * family.on_meta(KLEIN, "text_encoder").config.hidden_size == transformer.config.joint_attention_dim
    assert family.sizes(KLEIN) == (1024, 16)
    assert family.known_sizes(KLEIN) is None
    assert family.labels(transformer) == KLEIN_4B


def test_the_sizes_of_a_folder_are_read_from_it(tmp_path: Path) -> None:
    family, config = KleinFamily(), ModelConfig(str(save_tiny_random_klein(tmp_path)))
    assert family.on_meta(config, "transformer").config.num_layers == 2
    assert family.on_meta(config, "text_encoder").config.num_hidden_layers == 28
    assert family.known_sizes(config) == (32, 8)
    assert all(weight.is_meta for part in family.parts for weight in family.on_meta(config, part).parameters())


def test_random_weights_neither_explode_nor_vanish(tmp_path: Path) -> None:
    config = ModelConfig(str(save_tiny_random_klein(tmp_path)))
    base = random_klein(config, torch.device("cpu"), torch.float32)
    embeds = base.encode_prompts(["a cup", "a tree"])["prompt_embeds"]
    assert not torch.equal(embeds[0], embeds[1])
    mean, std = base.posterior(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert 0.01 < float(mean.std()) < 100
    assert not std.any()
