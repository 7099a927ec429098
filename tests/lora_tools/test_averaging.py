"""`average`: the file adds the weighted mean of the updates of its members, in any layout; error messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_layouts import (
    ALPHAS,
    Factors,
    adapted,
    as_diffusers_loads,
    comfyui,
    factors,
    kohya,
    lycoris,
    peft,
    processor,
    saved,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flatlora_diffusion.adapter.delta import Update
from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.config import AverageConfig, ConfigError
from flatlora_diffusion.lora_tools.averaging import average_updates


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return adapted(base)


def varied(whole: Factors, seed: int, rank: int | None = None) -> Factors:
    """Another random LoRA of the same layers, of another rank where one is given."""
    rng = torch.Generator().manual_seed(seed)

    def drawn(value: Tensor, axis: int) -> Tensor:
        shape = list(value.shape)
        shape[axis] = rank or shape[axis]
        return torch.randn(shape, generator=rng) * 0.2

    return {
        part: {module: (drawn(down, 0), drawn(up, 1)) for module, (down, up) in layers.items()}
        for part, layers in whole.items()
    }


def effect(whole: Factors, alphas: Mapping[str, float] = ALPHAS) -> dict[str, Tensor]:
    """alpha / rank * B A of each layer in float64, by PART.MODULE."""
    return {
        f"{part}.{module}": (alphas[part] / len(down))
        * (up.double().flatten(1) @ down.double().flatten(1)).view(len(up), *down.shape[1:])
        for part, layers in whole.items()
        for module, (down, up) in layers.items()
    }


@pytest.fixture
def two_loras(pipeline: Any, tmp_path: Path) -> tuple[Factors, Factors]:
    """Two LoRAs of the same layers, of ranks 4 and 2, as a.safetensors and b.safetensors in kohya's layout."""
    first = factors(pipeline)
    second = varied(first, 1, rank=2)
    saved(kohya(first), tmp_path / "a.safetensors")
    saved(kohya(second), tmp_path / "b.safetensors")
    return first, second


def average(tmp_path: Path, base: Path, *arguments: str, names: tuple[str, ...] = ("a", "b")) -> int:
    files = [str(tmp_path / f"{name}.safetensors") for name in names]
    output = ["--output", str(tmp_path / "out.safetensors")]
    return main(["average", *files, "--base", str(base), "--dtype", "fp32", *output, *arguments])


@pytest.mark.parametrize(
    ("layout", "weights", "strength"),
    [("kohya", (), 1.0), ("diffusers", (3.0, 1.0), 1.0), ("diffusers", (1.0, 0.0), 1.3)],
)
def test_a_stock_pipeline_loads_the_weighted_mean(
    two_loras: tuple[Factors, Factors],
    base: Path,
    tmp_path: Path,
    layout: str,
    weights: tuple[float, ...],
    strength: float,
) -> None:
    given = ["--weights", *map(str, weights)] if weights else []
    assert average(tmp_path, base, *given, "--strength", str(strength), "--layout", layout) == 0
    shares = [weight / sum(weights) for weight in weights] if weights else [0.5, 0.5]
    first, second = map(effect, two_loras)
    found = as_diffusers_loads(base, tmp_path / "out.safetensors")
    assert found.keys() == first.keys()
    for name, value in first.items():
        expected = strength * (shares[0] * value + shares[1] * second[name])
        assert (found[name].double() - expected).norm() <= 1e-5 * expected.norm(), name


LAYOUTS: dict[str, Callable[[Factors], dict[str, Tensor]]] = {
    "kohya": kohya,
    "kohya with diffusers' names": lambda whole: kohya(whole, original=False),
    "peft": peft,
    "processor": lambda whole: processor(whole, ALPHAS),
    "comfyui": lambda whole: comfyui(whole, ALPHAS),
    "lycoris": lycoris,
}


def test_loras_of_different_formats_average_like_their_separate_files(
    pipeline: Any, base: Path, tmp_path: Path
) -> None:
    """Each layout's reading is another test's; here that any mixture gives the mean of what each file is read as."""
    from flatlora_diffusion.lora_tools.converting import read_lora_file

    whole = factors(pipeline)
    attention = {"unet": {name: value for name, value in whole["unet"].items() if name.endswith(("to_q", "to_out.0"))}}
    members = []
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        path = saved(
            layout(varied(attention, number, rank=1 + number % 3)), tmp_path / f"{name[:3]}-{number}.safetensors"
        )
        members.append(path)
    output = tmp_path / "out.safetensors"
    assert main(["average", *map(str, members), "--base", str(base), "--dtype", "fp32", "--output", str(output)]) == 0
    read = [read_lora_file(str(path), str(base)).updates["unet"] for path in members]
    result = read_lora_file(str(output), str(base)).updates["unet"]
    for module in read[0]:
        mean = sum(product(member[module]) for member in read) / len(read)
        assert isinstance(mean, Tensor)
        assert (product(result[module]) - mean).norm() <= 1e-5 * mean.norm(), module


def product(update: Update) -> Tensor:
    return update.scale * (update.up.double().flatten(1) @ update.down.double().flatten(1))


def test_the_average_is_exact_and_with_rank_the_best_of_that_rank() -> None:
    rng = torch.Generator().manual_seed(0)

    def lora(rank: int, scale: float) -> Update:
        return Update(torch.randn(rank, 9, generator=rng), torch.randn(7, rank, generator=rng), scale)

    members = [{"unet": {"layer": lora(rank, scale)}} for rank, scale in ((2, 0.5), (3, 2.0), (1, 1.0))]
    weights = [0.5, 0.2, 0.3]
    exact = sum(w * product(member["unet"]["layer"]) for w, member in zip(weights, members, strict=True))
    assert isinstance(exact, Tensor)
    whole = average_updates(members, weights)
    torch.testing.assert_close(product(whole.updates["unet"]["layer"]), exact, rtol=1e-6, atol=1e-6)
    assert whole.lost == 0
    for rank in (1, 2, 4):
        cut = average_updates(members, weights, rank)
        left, values, right = torch.linalg.svd(exact)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        torch.testing.assert_close(product(cut.updates["unet"]["layer"]), best, rtol=1e-5, atol=1e-5)
        assert cut.lost == pytest.approx(float((exact - best).norm() / exact.norm()), rel=1e-5)


def test_the_printed_rank_and_loss_are_those_of_the_file(
    two_loras: tuple[Factors, Factors], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert average(tmp_path, base, "--rank", "3") == 0
    first, second = map(effect, two_loras)
    mean = {name: (value + second[name]) / 2 for name, value in first.items()}
    found = as_diffusers_loads(base, tmp_path / "out.safetensors")
    missed = math.sqrt(sum(float((found[name].double() - value).square().sum()) for name, value in mean.items()))
    whole = math.sqrt(sum(float(value.square().sum()) for value in mean.values()))
    output = capsys.readouterr().out
    assert "rank 3" in output
    assert float(output.split("lost by truncation: ")[1].split(" %")[0]) == pytest.approx(
        100 * missed / whole, rel=0.01
    )


def test_the_metadata_lists_the_averaged_loras(pipeline: Any, base: Path, tmp_path: Path) -> None:
    whole = factors(pipeline)
    for name, steps in (("a", "300"), ("b", "500")):
        facts = {"ss_steps": steps, "ss_resolution": "(64, 64)", "modelspec.trigger_phrase": "TOK"}
        saved(kohya(varied(whole, int(steps))), tmp_path / f"{name}.safetensors", **facts)
    assert average(tmp_path, base, "--weights", "3", "1", "--strength", "1.2") == 0
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
    made_of = json.loads(metadata["flatlora.average"])
    assert made_of["strength"] == 1.2
    assert [(part["name"], part["weight"]) for part in made_of["members"]] == [("a", 0.75), ("b", 0.25)]
    assert "average of 2 LoRAs" in metadata["ss_training_comment"]
    # What the members agree on stays, what holds for some alone does not.
    assert metadata["ss_resolution"] == "(64, 64)"
    assert metadata["modelspec.trigger_phrase"] == "TOK"
    assert "ss_steps" not in metadata
    assert metadata["ss_network_dim"] == "8"
    assert str(tmp_path) not in json.dumps(metadata)


def test_new_tokens_are_averaged_with_the_lora(two_loras: tuple[Factors, Factors], base: Path, tmp_path: Path) -> None:
    tables = [{"clip_l": torch.full((2, 3), value), "clip_g": torch.full((2, 4), -value)} for value in (1.0, 5.0)]
    for name, table in zip("ab", tables, strict=True):
        save_file(table, tmp_path / f"{name}_emb.safetensors")
    assert average(tmp_path, base, "--weights", "1", "3") == 0
    found = load_file(tmp_path / "out_emb.safetensors")
    torch.testing.assert_close(found, {"clip_l": torch.full((2, 3), 4.0), "clip_g": torch.full((2, 4), -4.0)})


def error_message(capsys: pytest.CaptureFixture[str], tmp_path: Path, code: int) -> str:
    """The error, which is one sentence and leaves no output file."""
    error = capsys.readouterr().err.strip()
    assert code == 2, error
    assert len(error.splitlines()) == 1, error
    assert not (tmp_path / "out.safetensors").exists()
    return error


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (("--weights", "1"), "weights=1"),
        (("--weights", "1", "-1"), "weights"),
        (("--weights", "0", "0"), "weights=0 0"),
        (("--weights", "nan", "1"), "weights"),
        (("--rank", "7"), "rank=7"),
        (("--strength", "0"), "strength"),
    ],
)
def test_an_invalid_setting_of_the_average_is_named(
    two_loras: tuple[Factors, Factors],
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    setting: str,
) -> None:
    assert setting in error_message(capsys, tmp_path, average(tmp_path, base, *arguments))


def test_a_single_lora_or_the_same_twice_is_an_error(
    two_loras: tuple[Factors, Factors], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "two or more" in error_message(capsys, tmp_path, average(tmp_path, base, names=("a",)))
    with pytest.raises(ConfigError, match="loras"):
        AverageConfig(loras=("a", "a"))
    (tmp_path / "copy.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes())
    assert "more than once" in error_message(capsys, tmp_path, average(tmp_path, base, names=("a", "b", "copy")))
    assert average(tmp_path, base, "--output", str(tmp_path / "b.safetensors"), "--overwrite") == 2
    assert "b.safetensors" in capsys.readouterr().err


def test_loras_with_different_layers_text_encoders_or_tokens_are_an_error(
    two_loras: tuple[Factors, Factors], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, second = two_loras
    fewer = {part: dict(layers) for part, layers in second.items()}
    gone = fewer["unet"].popitem()[0]
    saved(kohya(fewer), tmp_path / "fewer.safetensors")
    for names in (("a", "fewer"), ("fewer", "a")):
        error = error_message(capsys, tmp_path, average(tmp_path, base, names=names))
        assert "fewer lacks 1" in error
        assert gone in error
    saved(kohya({"unet": second["unet"]}), tmp_path / "unet.safetensors")
    assert "unet lacks" in error_message(capsys, tmp_path, average(tmp_path, base, names=("a", "unet")))
    save_file({"clip_l": torch.zeros(1, 3), "clip_g": torch.zeros(1, 4)}, tmp_path / "a_emb.safetensors")
    assert "new tokens" in error_message(capsys, tmp_path, average(tmp_path, base))
    save_file({"clip_l": torch.zeros(2, 3), "clip_g": torch.zeros(2, 4)}, tmp_path / "b_emb.safetensors")
    assert "new tokens" in error_message(capsys, tmp_path, average(tmp_path, base))


def test_a_dora_a_nan_and_another_base_are_errors(
    two_loras: tuple[Factors, Factors], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(tmp_path / "b.safetensors")
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {name: tensors[name] * math.nan}, tmp_path / "nan.safetensors")
    assert "nan.safetensors" in error_message(capsys, tmp_path, average(tmp_path, base, names=("a", "nan")))
    layer = name.removesuffix(".lora_up.weight")
    save_file(tensors | {f"{layer}.dora_scale": torch.ones(len(tensors[name]))}, tmp_path / "dora.safetensors")
    assert "dora.safetensors" in error_message(capsys, tmp_path, average(tmp_path, base, names=("a", "dora")))


def test_loras_whose_metadata_name_different_bases_need_the_base_flag(
    pipeline: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One base is often called by its hub id in one file and by a file's name in another."""
    from flatlora_diffusion.lora_tools import averaging

    whole = factors(pipeline)
    for number, name in enumerate(("a", "b")):
        saved(kohya(varied(whole, number)), tmp_path / f"{name}.safetensors", ss_sd_model_name=f"base-{name}")
    assert average(tmp_path, base) == 0
    (tmp_path / "out.safetensors").unlink()
    read = averaging.read_lora_file
    monkeypatch.setattr(averaging, "read_lora_file", lambda file, _: read(file, str(base)))
    arguments = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    error = error_message(
        capsys, tmp_path, main(["average", *arguments, "--output", str(tmp_path / "out.safetensors")])
    )
    assert "base-a" in error
    assert "--base" in error


def test_runs_on_different_base_weights_are_an_error(
    two_loras: tuple[Factors, Factors], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name, fingerprint in (("a", "1111"), ("b", "2222")):
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_bytes((tmp_path / f"{name}.safetensors").read_bytes())
        (folder / "config.json").write_text("{}", encoding="utf-8")
        (folder / "events.jsonl").write_text(json.dumps({"event": "start", "base": fingerprint}) + "\n")
        folders.append(str(folder))
    output = ["--base", str(base), "--output", str(tmp_path / "out.safetensors")]
    error = error_message(capsys, tmp_path, main(["average", *folders, *output]))
    assert "run-a on 1111" in error
