"""LoRA files of klein in every layout, against diffusers' loader and by hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from tiny_models import normal
from torch import Tensor, nn

from flatlora_diffusion.adapter.delta import Update, Updates
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import KLEIN, ConfigError, ModelConfig
from flatlora_diffusion.families.klein.family import KleinFamily
from flatlora_diffusion.families.klein.lora_names import original_layer
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.lora_files.reading import import_lora
from flatlora_diffusion.lora_files.safe_reading import read_header
from flatlora_diffusion.lora_tools.tool_support import tool_support

RANK, ALPHA = 2, 3.0
Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def transformer(klein: Path) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel.from_pretrained(klein, subfolder="transformer")


def block_layers(transformer: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: layer
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and "transformer_blocks." in name
    }


def original_factors(transformer: nn.Module) -> Factors:
    """A and B of each original layer: one of a double block's query, key and value together."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, layer in block_layers(transformer).items():
        path, third = original_layer(name)
        shapes[path] = (layer.out_features * (1 if third is None else 3), layer.in_features)
    return {
        path: (normal(index, RANK, inputs), normal(index + 100, outputs, RANK))
        for index, (path, (outputs, inputs)) in enumerate(sorted(shapes.items()))
    }


def expected(transformer: nn.Module, scale: float) -> dict[str, Tensor]:
    """The update of each layer of diffusers, from the original factors."""
    factors, updates = original_factors(transformer), {}
    for name, layer in block_layers(transformer).items():
        path, third = original_layer(name)
        down, up = factors[path]
        rows = up if third is None else up[third * layer.out_features : (third + 1) * layer.out_features]
        updates[name] = scale * rows @ down
    return updates


def kohya(factors: Factors) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in factors.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
    return tensors


def comfyui(factors: Factors) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, (down, up) in factors.items():
        tensors |= {f"diffusion_model.{path}.lora_A.weight": down, f"diffusion_model.{path}.lora_B.weight": up}
    return tensors


def delta(update: Update) -> Tensor:
    return update.scale * update.up @ update.down


def deltas(updates: Updates) -> dict[str, Tensor]:
    assert updates.keys() == {"transformer"}
    return {module: delta(update) for module, update in updates["transformer"].items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize(("layout", "scale"), [(kohya, ALPHA / RANK), (comfyui, 1.0)])
def test_original_layouts_are_read_with_fused_layers_split(
    layout: Callable[[Factors], dict[str, Tensor]],
    scale: float,
    transformer: Flux2Transformer2DModel,
    klein: Path,
    tmp_path: Path,
) -> None:
    path = tmp_path / "lora.safetensors"
    save_file(layout(original_factors(transformer)), path)
    lora = import_lora(read_header(path), str(klein))
    wanted = expected(transformer, scale)
    assert_same(deltas(lora.updates), wanted)
    assert not lora.unknown
    pipeline = Flux2KleinPipeline.from_pretrained(klein)
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    merged = {
        name: layer.get_delta_weight("default_0")
        for name, layer in pipeline.transformer.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert_same(merged, wanted)


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "base_model.model.", ""])
def test_diffusers_names_are_read_behind_each_prefix(
    prefix: str, transformer: Flux2Transformer2DModel, klein: Path, tmp_path: Path
) -> None:
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for index, (name, layer) in enumerate(block_layers(transformer).items()):
        down, up = normal(index, RANK, layer.in_features), normal(index + 50, layer.out_features, RANK)
        tensors |= {f"{prefix}{name}.lora_A.weight": down, f"{prefix}{name}.lora_B.weight": up}
        wanted[name] = up @ down
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = import_lora(read_header(tmp_path / "lora.safetensors"), str(klein))
    assert_same(deltas(lora.updates), wanted)
    support = {row.tool: row.layers for row in tool_support(lora)}
    assert support["diffusers"] == (len(wanted) if prefix else 0)
    assert support["ComfyUI"] == (len(wanted) if prefix in ("transformer.", "") else 0)


def test_without_a_base_a_file_is_of_the_klein_whose_names_and_shapes_it_has(tmp_path: Path) -> None:
    whole = KleinFamily().on_meta(ModelConfig(KLEIN), "transformer")
    name = "single_transformer_blocks.19.attn.to_out"
    layer = whole.get_submodule(name)
    tensors = {
        f"transformer.{name}.lora_A.weight": torch.ones(1, layer.in_features),
        f"transformer.{name}.lora_B.weight": torch.ones(layer.out_features, 1),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = import_lora(read_header(tmp_path / "lora.safetensors"), None)
    assert lora.base.base == "FLUX.2 klein"
    assert family_of(ModelConfig(KLEIN)).name == "FLUX.2 klein"
    tensors = {key: value[..., :-1] if "lora_A" in key else value for key, value in tensors.items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="for Flux"):
        import_lora(read_header(tmp_path / "lora.safetensors"), None)


def test_a_file_of_double_blocks_alone_is_not_taken_for_another_model(tmp_path: Path) -> None:
    whole = KleinFamily().on_meta(ModelConfig(KLEIN), "transformer")
    name = "transformer_blocks.0.attn.add_k_proj"
    layer = whole.get_submodule(name)
    tensors = {
        f"transformer.{name}.lora_A.weight": torch.ones(1, layer.in_features),
        f"transformer.{name}.lora_B.weight": torch.ones(layer.out_features, 1),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    assert import_lora(read_header(tmp_path / "lora.safetensors"), None).base.base == "FLUX.2 klein"


def test_models_of_two_families_have_no_difference_to_extract(klein: Path, base: Path, capsys: Any) -> None:
    for first, second in ((klein, base), (base, klein)):
        assert main(["extract", "--base", str(first), "--tuned", str(second)]) == 2
        assert f"tuned={str(second)!r} is " in capsys.readouterr().err


def test_a_damaged_base_is_named_when_a_file_is_inspected(klein: Path, tmp_path: Path, capsys: Any) -> None:
    save_file({"a.lora_A.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    shutil.copytree(klein, tmp_path / "klein")
    for name in ("transformer/config.json", "model_index.json"):
        (tmp_path / "klein" / name).write_text("{}x", encoding="utf-8")
        assert main(["inspect", str(tmp_path / "lora.safetensors"), "--base", str(tmp_path / "klein")]) == 2
        assert f"{Path(name)} is damaged (" in capsys.readouterr().err


def test_fused_rows_that_cannot_be_divided_are_refused(klein: Path, tmp_path: Path) -> None:
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {f"{name}.lora_A.weight": torch.ones(1, 32), f"{name}.lora_B.weight": torch.ones(97, 1)}
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="shapes do not fit"):
        import_lora(read_header(tmp_path / "lora.safetensors"), str(klein))


def test_import_resize_average_and_merge_work_on_klein(
    transformer: Flux2Transformer2DModel, klein: Path, tmp_path: Path
) -> None:
    source, wanted = tmp_path / "kohya.safetensors", expected(transformer, ALPHA / RANK)
    save_file(kohya(original_factors(transformer)), source)
    base = ["--base", str(klein)]
    imported = tmp_path / "imported.safetensors"
    assert main(["import", str(source), "--output", str(imported), "--dtype", "fp32", *base]) == 0
    tensors = load_file(imported)
    for name, value in wanted.items():
        down, up = (tensors[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        torch.testing.assert_close(up @ down, value)

    average = tmp_path / "average.safetensors"
    arguments = ["average", str(source), str(imported), "--output", str(average), "--dtype", "fp32"]
    assert main([*arguments, *base]) == 0
    assert_same(deltas(import_lora(read_header(average), str(klein)).updates), wanted)

    resized = tmp_path / "resized.safetensors"
    assert main(["resize", str(imported), "--rank", "1", "--output", str(resized), "--dtype", "fp32", *base]) == 0
    for name, value in deltas(import_lora(read_header(resized), str(klein)).updates).items():
        left, values, right = torch.linalg.svd(wanted[name])
        best = values[0] * left[:, :1] @ right[:1]
        torch.testing.assert_close(value, best, rtol=1e-3, atol=1e-3 * float(best.abs().max()))

    merged = tmp_path / "merged"
    assert main(["merge", "--lora", str(imported), "--output", str(merged), *base]) == 0
    stock = Flux2KleinPipeline.from_pretrained(merged)
    for name, layer in block_layers(transformer).items():
        after = stock.transformer.get_submodule(name).weight
        torch.testing.assert_close(after, layer.weight + wanted[name])


def test_kohya_layout_and_single_files_are_refused_for_klein(
    transformer: Flux2Transformer2DModel, klein: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "lora.safetensors"
    save_file(comfyui(original_factors(transformer)), source)
    base = ["--base", str(klein)]
    assert main(["export", str(source), "--layout", "kohya", *base]) == 2
    assert "--layout" in capsys.readouterr().err
    assert (
        main(["merge", "--lora", str(source), "--single_file", "--output", str(tmp_path / "m.safetensors"), *base])
        == 2
    )
    assert "single_file" in capsys.readouterr().err
