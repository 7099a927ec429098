"""The command line: wrong input is an error of one sentence with exit code 2."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_random_klein import save_tiny_random_klein

from flatlora_diffusion.commands.command_line import DEMO_ARMS, main, train_main
from flatlora_diffusion.compare import comparison
from flatlora_diffusion.config import (
    INCLUDED_BASES,
    TINY,
    TINY_KLEIN,
    CompareConfig,
    RunError,
    TrainConfig,
)
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.flatness import report as flatness_report


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def error_message(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert train_main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_missing_images_are_an_error(capsys: pytest.CaptureFixture[str], empty: Path) -> None:
    assert "--instance_data_dir is missing" in error_message(capsys, [])
    assert "has no readable image" in error_message(capsys, ["--instance_data_dir", str(empty)])
    assert "nowhere" in error_message(capsys, ["--instance_data_dir", str(empty / "nowhere")])


def test_a_missing_caption_is_an_error(capsys: pytest.CaptureFixture[str], empty: Path) -> None:
    Image.new("RGB", (8, 8)).save(empty / "fox.png")
    error = error_message(capsys, ["--instance_data_dir", str(empty)])
    assert "fox.png has no caption" in error
    assert "--instance_prompt" in error


def test_a_missing_model_is_an_error(capsys: pytest.CaptureFixture[str], icons: Path, empty: Path) -> None:
    arguments = ["--instance_data_dir", str(icons), "--pretrained_model_name_or_path"]
    assert "without model_index.json" in error_message(capsys, [*arguments, str(empty)])
    assert "does not exist: there is no such folder" in error_message(capsys, [*arguments, str(empty / "nowhere")])


@pytest.mark.parametrize(
    "setting", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "init_lora"]
)
@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "nowhere.safetensors", "nowhere"])
def test_pickles_and_missing_files_are_errors_before_torch_is_imported(
    capsys: pytest.CaptureFixture[str],
    icons: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    name: str,
) -> None:
    monkeypatch.setitem(sys.modules, "flatlora_diffusion.training.trainer", None)  # an import of it would fail
    file = tmp_path / name
    if "nowhere" not in name:
        torch.save({}, file)
    arguments = ["--instance_data_dir", str(icons), f"--{setting}", str(file), "--output_dir", str(tmp_path / "run")]
    assert f"{setting}={str(file)!r}" in error_message(capsys, arguments)


@pytest.fixture
def places(base: Path, icons: Path, lora: Path) -> dict[str, str]:
    return {"BASE": str(base), "ICONS": str(icons), "LORA": str(lora), "RUN": str(lora.parent)}


@pytest.mark.parametrize("name", ["nope", "nope.safetensors", "./some/nope", "nope.ckpt"])
@pytest.mark.parametrize(
    "line",
    [
        "merge --base",
        "extract --tuned BASE --base",
        "extract --base BASE --tuned",
        "export LORA --base",
        "import LORA --base",
        "resize LORA --base",
        "inspect LORA --base",
        "generate --prompts fox --pretrained_model_name_or_path",
        "flatness RUN --other_base",
    ],
)
def test_the_error_for_a_missing_base_names_the_verb_s_flag(
    capsys: pytest.CaptureFixture[str],
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = line.split()
    assert main([*(places.get(word, word) for word in words), name]) == 2
    error = capsys.readouterr().err
    assert f"error: {words[-1].removeprefix('--')}={name!r}" in error
    assert "LoRA" not in error
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_resolution_is_an_error(
    capsys: pytest.CaptureFixture[str], icons: Path, base: Path, tmp_path: Path
) -> None:
    arguments = ["--instance_data_dir", str(icons), "--pretrained_model_name_or_path", str(base), "--resolution", "33"]
    assert "resolution=33 must be a multiple of 16" in error_message(
        capsys, [*arguments, "--output_dir", str(tmp_path)]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', 'prompts.jsonl line 2: "prompt" is 3, but must be a text'),
        ('{"prompt": "a", "negative_prompt": ["b"]}', "\"negative_prompt\" is ['b'], but must be a text"),
        ('{"prompt": "a", "seed": "1"}', "\"seed\" is '1', but must be a whole number"),
        ('{"prompt": "a", "seed": -1}', '"seed" is -1, but must be a whole number'),
        ('{"seed": 1}', "prompts.jsonl line 2"),
        ("prompt", "prompts.jsonl line 2"),
        ("\udcff", "prompts.jsonl' cannot be read; give a UTF-8 text file"),
    ],
)
def test_an_invalid_prompts_file_is_an_error(
    capsys: pytest.CaptureFixture[str], icons: Path, tmp_path: Path, line: str, message: str
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    file.write_text('{"prompt": "a fox", "seed": 3}\n' + line, encoding="utf-8", errors="surrogateescape")
    arguments = ["--instance_data_dir", str(icons), "--output_dir", str(out), "--validation_prompts_file", str(file)]
    assert message in error_message(capsys, arguments)
    assert not out.exists()


def test_sigma_with_plain_lora_is_an_error(capsys: pytest.CaptureFixture[str], icons: Path) -> None:
    arguments = ["--instance_data_dir", str(icons), "--method", "lora", "--sigma", "0.1"]
    assert "--method lora has no sigma" in error_message(capsys, arguments)


def test_an_unknown_flag_and_an_unknown_verb_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--no_such_flag" in error_message(capsys, ["--no_such_flag", "1"])
    assert main(["nonsense"]) == 2
    assert "error: flatlora has no verb 'nonsense'; use one of: demo, train, compare" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flatlora-diffusion {version('flatlora-diffusion')}\n"


VERBS = {
    "caption",
    *("train", "compare", "evidence", "generate", "flatness"),
    *("export", "import", "merge", "resize", "average", "extract", "inspect"),
}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "help", "h"])
def test_without_a_verb_the_help_has_a_line_for_each(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "usage: flatlora VERB [--help]"
    assert {line.split()[0] for line in lines} == VERBS | {"app", "demo", "doctor"}
    assert all(len(line) < 100 for line in lines)


def test_the_demo_is_compare_with_the_demo_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[TrainConfig, CompareConfig]] = []

    def compare(config: TrainConfig, own: CompareConfig) -> Path:
        asked.append((config, own))
        raise RunError("enough")

    monkeypatch.setattr(comparison, "compare", compare)
    assert main(["demo", "--max_train_steps", "7"]) == 1
    assert main(["demo", "--guidance_scale", "4", "--arms", "lora"]) == 1
    assert main(["demo"]) == 1
    (config, own), (_, given), (_, usual) = asked
    assert (config.optim.max_train_steps, config.run.output_dir) == (7, "outputs/demo")
    assert (own.guidance_scale, given.guidance_scale) == (2.5, 4)
    assert (own.arms, given.arms, usual.arms) == (DEMO_ARMS, ("lora",), DEMO_ARMS)


def test_the_demo_on_the_tiny_klein_has_settings_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[TrainConfig, CompareConfig]] = []

    def compare(config: TrainConfig, own: CompareConfig) -> Path:
        asked.append((config, own))
        raise RunError("enough")

    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.setitem(INCLUDED_BASES, TINY_KLEIN, tmp_path / "klein")
    assert main(["demo", "--base", "tiny_klein"]) == 2
    assert "pretrained_model_name_or_path='tiny_klein'" in capsys.readouterr().err, "it has no weights"
    save_tiny_random_klein(tmp_path / "klein")
    assert main(["demo", "--base", "tiny_klein", "--max_train_steps=7"]) == 1
    assert main(["demo", "--base=tiny"]) == 1
    (klein, own), (sdxl, usual) = asked
    assert (klein.model.pretrained_model_name_or_path, klein.optim.max_train_steps) == (TINY_KLEIN, 7)
    assert (klein.adapter.lora_target_modules, klein.run.output_dir) == ("all-linear", "outputs/demo_klein")
    assert (own.guidance_scale, usual.guidance_scale) == (4, 2.5)
    assert sdxl.model.pretrained_model_name_or_path == TINY
    family_of(klein.model).check_settings(klein)


TINY_IN_WORDS = "the tiny demo base, 64 pixels"


@pytest.mark.parametrize(
    ("line", "program"),
    [
        ("train --instance_data_dir ICONS", "training.trainer.train"),
        ("compare --instance_data_dir ICONS", "compare.comparison.compare"),
        ("demo", "compare.comparison.compare"),
        ("evidence --pretrained_model_name_or_path tiny --resolution 64", "compare.evidence.evidence"),
        ("generate --prompts fox", "gallery.gallery.generate"),
        ("merge --base tiny --lora LORA --output x", "lora_tools.merging.merge_loras"),
        ("extract --base tiny --tuned owner/name", "lora_tools.resizing.extract_lora"),
    ],
)
def test_first_line_and_summary_of_a_verb_name_the_base(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    places: dict[str, str],
    tmp_path: Path,
    line: str,
    program: str,
) -> None:
    """Without a flag for it the base is no SDXL; the demo means it so, and `--base` is always given."""
    (tmp_path / "compare.md").touch()
    (tmp_path / "compare.json").write_text('{"verdict": ""}')

    def run(*_: Any) -> Any:
        assert caplog.messages[0].startswith(f"base: {TINY_IN_WORDS}"), "before anything else is logged"
        if program.startswith("lora_tools"):
            raise RunError("enough")
        return (
            [tmp_path] if "gallery" in program else tmp_path / "evidence.json" if "evidence" in program else tmp_path
        )

    monkeypatch.setattr(f"flatlora_diffusion.{program}", run)
    words = [places.get(word, word) for word in line.split()]
    with caplog.at_level(logging.INFO):
        assert main(words) == (1 if program.startswith("lora_tools") else 0)
    has_remedy = "--pretrained_model_name_or_path" in caplog.messages[0]
    assert has_remedy == (words[0] in ("train", "compare", "evidence", "generate"))
    assert program.startswith("lora_tools") or TINY_IN_WORDS in capsys.readouterr().out


def test_the_app_verb_names_the_missing_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flatlora_diffusion.app", "app"):  # where it stands in an installation and in a checkout
        if find_spec(name) is not None:
            monkeypatch.setattr(f"{name}.__main__.find_spec", lambda name: None)
    assert main(["app"]) == 2
    told = 'error: the app needs gradio, which is not installed: pip install "flatlora-diffusion[app]"\n'
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("page", [[], ["surface.html"]])
def test_flatness_lists_the_files_that_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page: list[str]
) -> None:
    for name in ("flatness.md", "surface.png", *page, "rise.png", "slices.png", "strength.png"):
        (tmp_path / name).touch()
    monkeypatch.setattr(flatness_report, "flatness", lambda config: tmp_path)
    assert main(["flatness", "some/run"]) == 0
    listed = ", ".join(["surface.png", *page, "rise.png", "slices.png"])
    assert f"Look at {listed} and strength.png in {tmp_path}" in capsys.readouterr().out


@pytest.mark.long
def test_importing_the_libraries_prints_nothing() -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.INFO); "
        "from flatlora_diffusion.commands.command_line import quiet_libraries; quiet_libraries(); "
        "import flatlora_diffusion.families.sdxl.pipeline"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP comes with PyTorch for Linux only")
def test_threads_wait_for_each_other_for_a_short_time_only() -> None:
    environment = {**os.environ, "OMP_DISPLAY_ENV": "verbose"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        environment.pop(name, None)
    code = "import flatlora_diffusion.commands.command_line, torch"
    program = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "GOMP_SPINCOUNT = '20000'" in program.stderr
