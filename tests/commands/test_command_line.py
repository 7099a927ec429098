"""What a user types: wrong input is one sentence and exit code 2."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image

from flatlora_diffusion.commands.command_line import DEMO_ARMS, DEMO_SAM_STEPS, main, train_main
from flatlora_diffusion.compare import comparison
from flatlora_diffusion.config import CompareConfig, RunError, TrainConfig
from flatlora_diffusion.flatness import report as flatness_report


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert train_main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_missing_images(capsys: pytest.CaptureFixture[str], empty: Path) -> None:
    assert "--instance_data_dir is missing" in complaint(capsys, [])
    assert "has no readable image" in complaint(capsys, ["--instance_data_dir", str(empty)])
    assert "nowhere" in complaint(capsys, ["--instance_data_dir", str(empty / "nowhere")])


def test_missing_caption(capsys: pytest.CaptureFixture[str], empty: Path) -> None:
    Image.new("RGB", (8, 8)).save(empty / "fox.png")
    error = complaint(capsys, ["--instance_data_dir", str(empty)])
    assert "fox.png has no caption" in error
    assert "--instance_prompt" in error


def test_no_model_there(capsys: pytest.CaptureFixture[str], icons: Path, empty: Path) -> None:
    arguments = ["--instance_data_dir", str(icons), "--pretrained_model_name_or_path"]
    assert "without model_index.json" in complaint(capsys, [*arguments, str(empty)])
    assert "does not exist: there is no such folder" in complaint(capsys, [*arguments, str(empty / "nowhere")])


@pytest.mark.parametrize(
    "setting", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "init_lora"]
)
@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "nowhere.safetensors", "nowhere"])
def test_a_pickle_and_what_is_not_there_are_refused_before_torch_is_imported(
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
    assert f"{setting}={str(file)!r}" in complaint(capsys, arguments)


@pytest.fixture
def places(base: Path, lora: Path) -> dict[str, str]:
    return {"BASE": str(base), "LORA": str(lora), "RUN": str(lora.parent)}


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
def test_a_base_that_is_not_there_is_named_by_the_flag_that_the_verb_has(
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


def test_bad_resolution(capsys: pytest.CaptureFixture[str], icons: Path, base: Path, tmp_path: Path) -> None:
    arguments = ["--instance_data_dir", str(icons), "--pretrained_model_name_or_path", str(base), "--resolution", "33"]
    assert "resolution=33 must be a multiple of 16" in complaint(capsys, [*arguments, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": 3}', 'prompts.jsonl line 2: "prompt" is 3, but must be a text'),
        ('{"prompt": "a", "negative_prompt": ["b"]}', "\"negative_prompt\" is ['b'], but must be a text"),
        ('{"prompt": "a", "seed": "1"}', "\"seed\" is '1', but must be a whole number"),
        ('{"prompt": "a", "seed": -1}', '"seed" is -1, but must be a whole number'),
        ('{"seed": 1}', "prompts.jsonl line 2 must be like"),
        ("prompt", "prompts.jsonl line 2 must be like"),
        ("\udcff", "prompts.jsonl' cannot be read; give a UTF-8 text file"),
    ],
)
def test_a_bad_prompts_file(
    capsys: pytest.CaptureFixture[str], icons: Path, tmp_path: Path, line: str, message: str
) -> None:
    file, out = tmp_path / "prompts.jsonl", tmp_path / "run"
    file.write_text('{"prompt": "a fox", "seed": 3}\n' + line, encoding="utf-8", errors="surrogateescape")
    arguments = ["--instance_data_dir", str(icons), "--output_dir", str(out), "--validation_prompts_file", str(file)]
    assert message in complaint(capsys, arguments)
    assert not out.exists()


def test_sigma_with_plain_lora_is_refused(capsys: pytest.CaptureFixture[str], icons: Path) -> None:
    arguments = ["--instance_data_dir", str(icons), "--method", "lora", "--sigma", "0.1"]
    with pytest.raises(SystemExit) as stop:
        train_main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert "--method lora has no sigma" in " ".join((printed.out + printed.err).replace("│", " ").split())


def test_an_unknown_flag_and_an_unknown_verb_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_main(["--no_such_flag", "1"])
    assert stop.value.code == 2
    assert main(["nonsense"]) == 2
    assert "error: flatlora has no verb 'nonsense'; there are: demo, train, compare" in capsys.readouterr().err


VERBS = {
    "caption",
    *("train", "compare", "evidence", "generate", "flatness"),
    *("export", "import", "merge", "resize", "extract", "inspect"),
}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=["nothing", "help", "h"])
def test_without_a_verb_each_has_a_line(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    first, _, *lines = capsys.readouterr().out.splitlines()
    assert first == "usage: flatlora VERB [--help]"
    assert {line.split()[0] for line in lines} == VERBS | {"app", "demo", "doctor"}
    assert all(len(line) < 100 for line in lines)


@pytest.mark.parametrize("verb", sorted(VERBS | {"app", "demo", "doctor"}))
def test_usage_names_the_command_as_one_types_it(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([verb, "--help"]))
    assert stop.value.code == 0
    typed = {"demo": "compare"}.get(verb, verb)
    assert capsys.readouterr().out.lstrip().startswith(f"usage: flatlora {typed}")


def test_the_demo_is_compare_with_its_preset(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert (own.arms, given.arms) == (DEMO_ARMS, ("lora",)), "steps that are given are those of SAM, too"
    assert usual.arms == ("lora", "flat-lora", f"sam:max_train_steps={DEMO_SAM_STEPS}")


def test_the_app_is_ours_and_says_what_it_lacks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flatlora_diffusion.app", "app"):  # where it stands in an installation and in a checkout
        if find_spec(name) is not None:
            monkeypatch.setattr(f"{name}.__main__.find_spec", lambda name: None)
    assert main(["app"]) == 2
    told = 'error: the app needs gradio, which is not installed: pip install "flatlora-diffusion[app]"\n'
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("page", [[], ["surface.html"]])
def test_flatness_names_the_files_that_are_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, page: list[str]
) -> None:
    for name in ("flatness.md", "surface.png", *page, "rise.png", "slices.png", "strength.png"):
        (tmp_path / name).touch()
    monkeypatch.setattr(flatness_report, "flatness", lambda config: tmp_path)
    assert main(["flatness", "some/run"]) == 0
    listed = ", ".join(["surface.png", *page, "rise.png", "slices.png"])
    assert f"Look at {listed} and strength.png in {tmp_path}" in capsys.readouterr().out


def test_no_library_speaks_when_it_is_imported() -> None:
    program = (
        "import logging; logging.basicConfig(level=logging.INFO); "
        "from flatlora_diffusion.commands.command_line import quiet_libraries; quiet_libraries(); "
        "import flatlora_diffusion.sdxl.pipeline"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
