"""The adapted layers and their ranks: presets, blocks, and settings that match no layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionXLPipeline
from tiny_runs import samples_of, trained

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.config import AdapterConfig, ConfigError, TrainConfig
from flatlora_diffusion.training.state import prepare


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lora_target_modules": "attn"}, {"to_q", "to_k", "to_v", "to_out.0"}),
        (
            {"lora_target_modules": "attn+ff"},
            {"to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"},
        ),
        ({"lora_target_modules": "to_q,ff.net.2"}, {"to_q", "ff.net.2"}),
    ],
)
def test_target_presets(config: TrainConfig, settings: dict[str, Any], expected: set[str]) -> None:
    state = prepare(config.replace(**settings), samples_of(config))
    ends = {next(end for end in expected if name.endswith(end)) for name in lora_layers(state.base.denoiser)}
    assert ends == expected


def test_linear_and_convolution_presets_leave_out_what_other_tools_drop(config: TrainConfig) -> None:
    linear = lora_layers(prepare(config.replace(lora_target_modules="all-linear"), samples_of(config)).base.denoiser)
    everything = lora_layers(prepare(config.replace(lora_target_modules="conv"), samples_of(config)).base.denoiser)
    assert set(linear) < set(everything)
    assert any(name.endswith("time_emb_proj") for name in linear)
    assert any(name.endswith("conv1") for name in set(everything) - set(linear))
    assert not [name for name in everything if not name.startswith(("down_blocks", "mid_block", "up_blocks"))]


def test_blocks_and_their_ranks(config: TrainConfig) -> None:
    chosen = config.replace(lora_unet_blocks="unet.up_blocks.0.attentions.0,mid_block", lora_block_ranks="mid_block=7")
    layers = lora_layers(trained(chosen).base.denoiser)
    assert {name.split(".attentions")[0] for name in layers} == {"up_blocks.0", "mid_block"}
    assert not any("attentions.1." in name for name in layers)
    assert {layer.r["default"] for name, layer in layers.items() if name.startswith("mid")} == {7}
    assert {layer.r["default"] for name, layer in layers.items() if name.startswith("up")} == {4}
    blora = lora_layers(prepare(config.replace(use_blora=True), samples_of(config)).base.denoiser)
    assert {".".join(name.split(".")[:4]) for name in blora} == {
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_target_modules": "to_x"}, "lora_target_modules='to_x'"),
        ({"lora_unet_blocks": "up_blocks.9"}, "lora_unet_blocks: 'up_blocks.9'"),
        ({"lora_block_ranks": "mid_block"}, "lora_block_ranks: 'mid_block' must be BLOCK=RANK"),
        ({"lora_block_ranks": "head=3"}, "lora_block_ranks: 'head'"),
    ],
)
def test_targets_that_do_not_exist(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(config.replace(**settings), samples_of(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora-ga", "rank": 9}, "rank=9 .* lora-ga .* at down_blocks.* 16 x 16; give at most 8"),
        ({"adapter": "lora-ga", "lora_block_ranks": "mid_block=999"}, "rank=999 .* lora-ga .* at mid_block"),
        ({"adapter": "pissa", "rank": 17}, "rank=17 .* pissa .* at down_blocks.* give at most 16"),
        ({"adapter": "lora-ga", "lora_target_modules": "conv1"}, "lora-ga.* linear .*conv1"),
        ({"adapter": "pissa", "lora_target_modules": "conv1"}, "pissa.* linear .*conv1"),
        (
            {
                "adapter": "lora-ga",
                "rank": 99,
                "train_text_encoder": True,
                "lora_block_ranks": "down_blocks=1,mid_block=1,up_blocks=1",
            },
            r"rank=99 .* at text_encoder\.",
        ),
    ],
)
def test_layers_that_cannot_have_the_adapter_are_refused_before_anything_is_added(
    base: Path, settings: dict[str, Any], message: str
) -> None:
    """So the error comes before images are encoded and gradients computed."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    encoders = {part: getattr(pipeline, part) for part in ("text_encoder", "text_encoder_2")}
    with pytest.raises(ConfigError, match=message):
        add_lora(pipeline.unet, AdapterConfig(**settings), 0, encoders if "train_text_encoder" in settings else None)
    assert not any(lora_layers(model) for model in (pipeline.unet, *encoders.values()))
