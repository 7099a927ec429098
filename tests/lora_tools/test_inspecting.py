"""`inspect`: the contents of a file, and for each tool the number of layers that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layouts import (
    ALPHAS,
    ATTENTION,
    RANK,
    UNET,
    adapted,
    as_diffusers_loads,
    deltas,
    factors,
    kohya,
    peft,
    saved,
)
from torch import Tensor

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.lora_tools.inspecting import trigger_words

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
WEB = {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.trigger_phrase": "zwx fox"}
TOOLS = (
    *("ComfyUI", "AUTOMATIC1111", "Forge", "InvokeAI", "SD.Next"),
    *("sd-scripts", "stable-diffusion.cpp", "Draw_Things", "diffusers"),
)


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return adapted(base, UNET, TEXT)


@pytest.fixture(scope="module")
def attention(base: Path) -> Any:
    return adapted(base, ATTENTION, TEXT)


def report(path: Path, base: Path | str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["inspect", str(path), "--base", str(base), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def loads(found: dict[str, Any]) -> dict[str, int]:
    return {row["tool"].replace(" ", "_"): row["layers"] for row in found["tools"]}


def note(found: dict[str, Any], tool: str) -> str:
    return next(str(row["note"]) for row in found["tools"] if row["tool"] == tool)


def test_the_contents_are_those_of_the_file(
    pipeline: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(saved(kohya(factors(pipeline)), tmp_path / "x.safetensors", **WEB), base, capsys)
    whole = factors(pipeline)
    count = {part: len(layers) for part, layers in whole.items()}
    assert found["layout"] == {"kohya": sum(count.values())}
    assert found["ranks"] == {str(RANK): sum(count.values())}
    assert found["alphas"] == {f"{ALPHAS[part]:g}": number for part, number in count.items()}
    assert found["dtype"] == {"F32": sum(count.values())}
    assert found["trigger_words"] == ["zwx fox"]
    by_block: dict[tuple[str, str], float] = {}
    for name, delta in deltas(pipeline).items():
        part, _, module = name.partition(".")
        steps = module.split(".")
        block = "" if part != "unet" else ".".join(steps[: 3 if steps[0] == "mid_block" else 4])
        by_block[part, block] = by_block.get((part, block), 0.0) + float(delta.square().sum())
    assert {(row["part"], row["block"]): row["norm"] for row in found["blocks"]} == {
        place: pytest.approx(square**0.5, rel=1e-4) for place, square in by_block.items()
    }


def test_three_tools_read_the_projection_of_the_second_text_encoder(
    attention: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = factors(attention)
    width = attention.text_encoder_2.text_projection.in_features
    whole["text_encoder_2"]["text_projection"] = torch.ones(RANK, width), torch.ones(width, RANK)
    total = sum(map(len, whole.values()))
    path = saved(kohya(whole), tmp_path / "x.safetensors", **WEB)
    found = loads(report(path, base, capsys))
    assert found == dict.fromkeys(TOOLS, total - 1) | dict.fromkeys(("ComfyUI", "Forge", "diffusers"), total)
    by_diffusers = as_diffusers_loads(base, path)
    assert len(by_diffusers) == total
    assert any("text_projection" in name for name in by_diffusers)
    found = loads(report(saved(peft(whole), tmp_path / "x.safetensors"), base, capsys))
    assert found["ComfyUI"] == len(whole["text_encoder"]) + len(whole["text_encoder_2"]) - 1


@pytest.mark.parametrize("tool", ["AUTOMATIC1111", "Forge", "SD.Next"])
def test_the_report_says_why_a_web_ui_hides_a_file(
    attention: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    tensors, path = kohya(factors(attention)), tmp_path / "x.safetensors"
    for metadata, why in (
        ({}, "have no ss_base_model_version"),
        ({"ss_base_model_version": "sd_v1"}, "call its base sd_v1"),
    ):
        found = report(saved(tensors, path, format="pt", **metadata), base, capsys)
        assert note(found, tool) == f"hidden while an SDXL model is loaded: the metadata {why}"


def test_layers_outside_the_blocks_are_lost_in_some_tools(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = factors(adapted(base, ("to_q", "add_embedding.linear_1", "conv_in"), ()))
    lost = ("conv_in", "add_embedding.linear_1")
    inside = {"unet": {name: value for name, value in whole["unet"].items() if name not in lost}}
    outside = {"unet": {name: value for name, value in whole["unet"].items() if name in lost}}
    tensors = kohya(inside) | kohya(outside, original=False)
    found = loads(report(saved(tensors, tmp_path / "x.safetensors", **WEB), base, capsys))
    total = len(whole["unet"])
    assert found["ComfyUI"] == total
    assert found["sd-scripts"] == total - 2
    assert found["stable-diffusion.cpp"] == found["diffusers"] == found["AUTOMATIC1111"] == total - 1
    assert found["InvokeAI"] == 0  # a mixture of block names


def test_a_lora_without_cross_attention_or_middle_block_is_noted(
    pipeline: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    up = {"unet": {name: v for name, v in factors(pipeline)["unet"].items() if name.startswith("up_blocks.0.res")}}
    found = report(saved(kohya(up), tmp_path / "x.safetensors", **WEB), base, capsys)
    assert "cannot recognize SDXL" in note(found, "InvokeAI")
    assert "SSD-1B" in note(found, "Draw Things")


def test_a_file_of_real_sdxl_is_distinguished_from_the_tiny_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(name: str, width: int, out: int) -> dict[str, Tensor]:
        return {f"{name}.lora_down.weight": torch.ones(2, width), f"{name}.lora_up.weight": torch.ones(out, 2)}

    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    for width, out, family in ((2048, 640, "SDXL"), (224, 96, "the tiny base of flatlora-diffusion")):
        path = saved(one(name, width, out), tmp_path / "x.safetensors")
        assert main(["inspect", str(path)]) == 0
        assert f"x.safetensors: a LoRA for {family}" in capsys.readouterr().out


def test_a_hub_id_that_is_not_downloaded_counts_as_sdxl_and_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 2048), f"{name}.lora_up.weight": torch.ones(640, 2)}
    path = saved(tensors, tmp_path / "x.safetensors")
    assert report(path, "someone/no-such-base", capsys)["base"] == "SDXL (someone/no-such-base is not on this disk)"
    assert report(path, "stabilityai/stable-diffusion-xl-base-1.0", capsys)["base"] == "SDXL"


def test_the_text_has_a_table_and_a_line_for_each_tool(
    attention: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(kohya(factors(attention)), tmp_path / "x.safetensors", **WEB)
    assert main(["inspect", str(path), "--base", str(base)]) == 0
    text = capsys.readouterr().out
    total = sum(map(len, factors(attention).values()))
    assert text.count(f"{total} of {total} modules will load") == 9
    assert "zwx fox" in text
    assert "unet.down_blocks.1.attentions.0" in text
    assert max(map(len, text.splitlines())) < 120


def test_many_unknown_keys_are_counted_and_not_all_printed(
    attention: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    norms = {f"lora_unet_norm_{number:03}.w_norm": torch.ones(4) for number in range(300)}
    path = saved(kohya(factors(attention)) | norms, tmp_path / "x.safetensors", **WEB)
    assert main(["inspect", str(path), "--base", str(base)]) == 0
    text = capsys.readouterr().out
    assert "300 keys of no layer" in text
    assert "norm_000" in text
    assert "norm_299" not in text
    assert len(report(path, base, capsys)["unknown_keys"]) == 300


def test_trigger_words_come_from_the_phrase_or_the_tags() -> None:
    tags = json.dumps({"1_fox": {"fox": 9, "red ": 4}, "2_owl": {"owl": 7}})
    assert trigger_words({"ss_tag_frequency": tags}) == ["fox", "owl", "red"]
    assert trigger_words({"ss_tag_frequency": tags, "modelspec.trigger_phrase": "zwx"}) == ["zwx"]
    for broken in ("[", "[1]", '{"a": 1}', '{"a": {"b": "c"}}', "[" * 9999):
        assert trigger_words({"ss_tag_frequency": broken}) == []
    assert "\x1b" not in trigger_words({"modelspec.trigger_phrase": "\x1b[2J"})[0]
