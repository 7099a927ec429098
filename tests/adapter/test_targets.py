"""Which layers are adapted and with which rank: presets, blocks, what names no layer."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_runs import samples_of, trained

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.config import ConfigError, TrainConfig
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
    ends = {next(end for end in expected if name.endswith(end)) for name in lora_layers(state.sdxl.unet)}
    assert ends == expected


def test_linear_and_convolution_presets_leave_out_what_other_tools_drop(config: TrainConfig) -> None:
    linear = lora_layers(prepare(config.replace(lora_target_modules="all-linear"), samples_of(config)).sdxl.unet)
    everything = lora_layers(prepare(config.replace(lora_target_modules="conv"), samples_of(config)).sdxl.unet)
    assert set(linear) < set(everything)
    assert any(name.endswith("time_emb_proj") for name in linear)
    assert any(name.endswith("conv1") for name in set(everything) - set(linear))
    assert not [name for name in everything if not name.startswith(("down_blocks", "mid_block", "up_blocks"))]


def test_blocks_and_their_ranks(config: TrainConfig) -> None:
    chosen = config.replace(lora_unet_blocks="unet.up_blocks.0.attentions.0,mid_block", lora_block_ranks="mid_block=7")
    layers = lora_layers(trained(chosen).sdxl.unet)
    assert {name.split(".attentions")[0] for name in layers} == {"up_blocks.0", "mid_block"}
    assert not any("attentions.1." in name for name in layers)
    assert {layer.r["default"] for name, layer in layers.items() if name.startswith("mid")} == {7}
    assert {layer.r["default"] for name, layer in layers.items() if name.startswith("up")} == {4}
    blora = lora_layers(prepare(config.replace(use_blora=True), samples_of(config)).sdxl.unet)
    assert {".".join(name.split(".")[:4]) for name in blora} == {
        "up_blocks.0.attentions.0",
        "up_blocks.0.attentions.1",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_target_modules": "to_x"}, "lora_target_modules='to_x' names no layer"),
        ({"lora_unet_blocks": "up_blocks.9"}, "lora_unet_blocks: 'up_blocks.9' holds no layer"),
        ({"lora_block_ranks": "mid_block"}, "lora_block_ranks: 'mid_block' must be BLOCK=RANK"),
        ({"lora_block_ranks": "head=3"}, "lora_block_ranks: 'head' holds no layer"),
    ],
)
def test_targets_that_do_not_exist(config: TrainConfig, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(config.replace(**settings), samples_of(config))
