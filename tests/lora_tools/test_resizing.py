"""`resize` and `extract`: the best LoRA of a rank, and its printed error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from lora_layouts import RANK, adapted, as_diffusers_loads, deltas, factors, kohya, saved
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.adapter.delta import Update, cut_to_rank
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.families.sdxl.single_file import save_single_file


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return adapted(base)


@pytest.fixture
def file(pipeline: Any, tmp_path: Path) -> Path:
    return saved(kohya(factors(pipeline)), tmp_path / "fox.safetensors")


def printed_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> float:
    """The percentage that the verb prints."""
    capsys.readouterr()
    assert main(arguments) == 0
    found = re.search(r"lost by the lower rank: (\S+) %", capsys.readouterr().out)
    assert found is not None
    return float(found[1])


def best(change: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).view_as(change).float()


def size(values: dict[str, Tensor]) -> float:
    return float(sum(value.double().square().sum() for value in values.values())) ** 0.5


@pytest.mark.parametrize("rank", [1, 2, RANK, 99])
def test_resizing_keeps_the_largest_singular_values(
    pipeline: Any, base: Path, file: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    printed = printed_error(capsys, ["resize", str(file), "--rank", str(rank), "--base", str(base)])
    whole = deltas(pipeline)
    found = as_diffusers_loads(base, file.with_name(f"fox_rank{rank}.safetensors"))
    expected = {name: best(change, rank) for name, change in whole.items()}
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-4 * whole[name].norm(), name
    error = size({name: found[name] - whole[name] for name in whole}) / size(whole)
    assert printed == pytest.approx(100 * error, rel=0.01, abs=1e-3)
    assert (error > 0.1) == (rank < RANK)
    ranks = {len(v) for name, v in load_file(file.with_name(f"fox_rank{rank}.safetensors")).items() if "down" in name}
    assert ranks == {max(2, min(rank, RANK))}  # one tool reads files of rank 1 wrongly


def test_the_rank_is_limited_by_the_size_of_a_narrow_layer() -> None:
    rng = torch.Generator().manual_seed(0)
    update = Update(torch.randn(8, 3, generator=rng), torch.randn(5, 8, generator=rng), 0.5)
    smaller, values = cut_to_rank(update, 6)
    assert smaller.down.shape == (3, 3)
    assert values.shape == (3,)
    torch.testing.assert_close(smaller.up @ smaller.down, 0.5 * update.up @ update.down)


def test_resizing_keeps_format_metadata_and_other_files(
    pipeline: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"ss_steps": "7", "ss_output_name": "fox", "modelspec.title": "fox"}
    file = saved(kohya(factors(pipeline)), tmp_path / "fox.safetensors", **old)
    output = tmp_path / "small.safetensors"
    arguments = ["resize", str(file), "--rank", "2", "--base", str(base), "--output", str(output)]
    printed_error(capsys, arguments)
    assert all(name.startswith("lora_") for name in load_file(output))
    with safe_open(output, framework="pt") as written:
        kept = written.metadata()
    # By its old name a web UI would take it for the file that it was made from.
    assert {key: kept[key] for key in old} == {"ss_steps": "7", "ss_output_name": "small", "modelspec.title": "small"}
    assert main(arguments) == 2
    assert "already exists" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tuned(pipeline: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a change of rank 4 in some layers of all parts."""
    model: Any = StableDiffusionXLPipeline.from_pretrained(base)
    changes = deltas(pipeline)
    for name, change in changes.items():
        part, _, module = name.partition(".")
        held = getattr(model, part)
        names = dict(held.named_modules())
        layer: Any = names.get(module) or names[module.removeprefix("text_model.")]
        layer.weight.data += change
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("rank", "layout"), [(RANK, "kohya"), (2, "kohya"), (RANK, "diffusers")])
def test_extracting_recovers_the_change_of_the_weights(
    pipeline: Any,
    base: Path,
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rank: int,
    layout: str,
) -> None:
    output = tmp_path / "x.safetensors"
    arguments = ["extract", "--base", str(base), "--tuned", str(tuned), "--rank", str(rank), "--layout", layout]
    printed = printed_error(capsys, [*arguments, "--dtype", "fp32", "--output", str(output)])
    whole = deltas(pipeline)
    found = as_diffusers_loads(base, output)
    assert found.keys() == whole.keys()
    for name, change in whole.items():
        assert (found[name] - best(change, rank)).norm() <= 1e-3 * change.norm(), name
    error = size({name: found[name] - whole[name] for name in whole}) / size(whole)
    assert printed == pytest.approx(100 * error, rel=0.01, abs=1e-3)
    assert (error > 0.1) == (rank < RANK)


@pytest.mark.parametrize("is_swapped", [False, True], ids=["tuned", "base"])
def test_single_file_config_applies_to_the_single_file_model_only(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], is_swapped: bool
) -> None:
    single = save_single_file(StableDiffusionXLPipeline.from_pretrained(tuned), tmp_path / "tuned.safetensors")
    output = str(tmp_path / "x.safetensors")
    models = (single, base) if is_swapped else (base, single)
    start = ["extract", "--base", str(models[0]), "--single_file_config", str(base), "--output", output, "--tuned"]
    assert main([*start, str(models[1])]) == 0
    assert any(float(value.abs().max()) > 0.01 for name, value in load_file(output).items() if "lora_up" in name)
    neither = ["--base", str(base), "--overwrite"]
    assert main([*start, str(tuned), *neither]) == 2
    assert "--single_file_config is for a single .safetensors file" in capsys.readouterr().err


def test_changes_that_a_lora_cannot_represent_are_a_warning(
    base: Path, tuned: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["extract", "--base", str(base), "--output", str(tmp_path / "x.safetensors"), "--tuned"]
    assert main([*arguments, str(tuned)]) == 0
    assert "changed tensor" not in caplog.text
    model: Any = StableDiffusionXLPipeline.from_pretrained(tuned)
    model.unet.conv_in.bias.data += 1
    model.save_pretrained(tmp_path / "biased")
    assert main([*arguments, str(tmp_path / "biased"), "--overwrite"]) == 0
    assert "1 changed tensor(s) of the unet that a LoRA cannot represent: conv_in.bias" in caplog.text


def test_extracting_from_equal_or_incompatible_models_is_an_error(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "x.safetensors")
    assert main(["extract", "--base", str(base), "--tuned", str(base), "--output", output]) == 2
    assert "has the same weights as the base" in capsys.readouterr().err
    assert main(["extract", "--base", str(base), "--tuned", "tiny", "--output", output]) == 2
    assert "has a unet of other shapes" in capsys.readouterr().err
    assert main(["extract", "--base", str(base)]) == 2
    assert "--tuned is missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
