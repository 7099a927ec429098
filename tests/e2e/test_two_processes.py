"""`accelerate launch` with two CPU processes trains what one process with accumulation 2 trains."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import ended, forked
from safetensors.torch import load_file

from flatlora_diffusion.commands.command_line import train_main
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir

ROOT = Path(__file__).parents[2]


def launched(arguments: list[str], said: Path) -> int:
    """The exit code of a run of two processes by accelerate's launcher."""
    config = ROOT / "samples" / "presets" / "accelerate" / "two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", f"--config_file={config}", f"--main_process_port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with said.open("wb") as file:
        command = [sys.executable, *launcher, "train_dreambooth_flatlora.py", *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=file).returncode


def together(arguments: list[str], *folders: Path) -> str:
    """Train in two processes into each of `folders`, as the launcher would start them; returns what both say."""
    said = [folders[0].with_name(f"{folders[0].name}-{rank}.txt") for rank in range(2)]
    runs = [[*arguments, f"--output_dir={folder}"] for folder in folders]
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    pair = [forked(said[rank], {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, *runs) for rank in range(2)]
    codes = [ended(process) for process in pair]
    texts = [file.read_text(encoding="utf-8") for file in said]
    assert codes == [0, 0], texts
    return "".join(texts)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def alone(arguments: list[str], folder: Path) -> None:
    """The same run of one process, this one."""
    assert train_main([*arguments, "--gradient_accumulation_steps=2", f"--output_dir={folder}"]) == 0


def assert_alike(one: Path, two: Path, atol: float = 1e-5) -> None:
    a, b = load_file(one / LORA_FILE), load_file(two / LORA_FILE)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=atol)


@pytest.fixture(scope="module")
def arguments(base: Path, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a run; the first one draws the class images."""
    return [
        f"--pretrained_model_name_or_path={base}",
        f"--instance_data_dir={icons}",
        "--max_train_steps=3",
        "--train_batch_size=1",
        "--learning_rate=0.01",
        "--sigma_schedule=constant",
        "--random_flip",
        "--adam_epsilon=0.001",  # Adam would blow up the rounding of gradients that are almost 0
        "--caption_dropout=0.3",
        "--seed=1",
        "--with_prior_preservation",
        f"--class_data_dir={tmp_path_factory.mktemp('class')}",
        "--class_prompt=an icon",
        "--num_class_images=3",
    ]


@pytest.fixture(scope="module")
def by_launcher(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that accelerate launched, with a checkpoint before its end, and what it said."""
    run = tmp_path_factory.mktemp("launched") / "run"
    said = run.with_name("said.txt")
    code = launched([*arguments, f"--output_dir={run}", "--checkpointing_steps=2"], said)
    text = said.read_text(encoding="utf-8")
    assert code == 0, text
    return run, text


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", ["--method=sam --adapter=lora-ga --rho_rise=0.25", "--method=bi-lora --adapter=pissa --rho=0.5"]
)
def test_what_ascends_does_so_alike_on_two_processes_and_on_one(
    arguments: list[str], tmp_path: Path, flags: str
) -> None:
    """WeightGradients of frozen weights and of the second LoRA are no part of DDP: the method shares them itself."""
    shared = [one for one in arguments if one != "--sigma_schedule=constant"]  # which these methods do not have
    both = [*shared, *flags.split()]
    together(both, tmp_path / "two")
    alone(both, tmp_path / "one")
    assert_alike(tmp_path / "one", tmp_path / "two", atol=1e-4)  # 0.009 if each process kept its own slopes
    one, two = (json.loads(RunDir(tmp_path / name).config_file.read_text())["rho"] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=2e-3), "a rise finds it by the slopes of all"


@pytest.mark.long
def test_two_processes_equal_one_with_accumulation(
    arguments: list[str], by_launcher: tuple[Path, str], tmp_path: Path
) -> None:
    alone(arguments, tmp_path / "one")
    assert_same_run(tmp_path / "one", *by_launcher)


@pytest.mark.long
def test_two_processes_train_a_klein_as_one_does(arguments: list[str], klein: Path, tmp_path: Path) -> None:
    of_sdxl = ("--pretrained", "--with_prior", "--class_data", "--num_class")
    of_klein = [one for one in arguments if not one.startswith(of_sdxl)]
    of_klein += [f"--pretrained_model_name_or_path={klein}", "--prior_from_base", "--gradient_checkpointing"]
    said = together(of_klein, tmp_path / "two")
    alone(of_klein, tmp_path / "one")
    assert_same_run(tmp_path / "one", tmp_path / "two", said)


@pytest.mark.long
def test_two_processes_without_a_seed_draw_one_and_train_together(arguments: list[str], tmp_path: Path) -> None:
    """Text encoders too, with the prior that needs no class images, for which a step calls the model twice."""
    drawn = [one for one in arguments if not one.startswith(("--seed", "--with_prior", "--class_data"))]
    drawn += ["--train_text_encoder", "--text_encoder_lr=0.01", "--prior_from_base"]
    said = together(drawn, tmp_path / "two")
    seed = json.loads((tmp_path / "two" / "config.json").read_text())["seed"]
    alone([*drawn, f"--seed={seed}"], tmp_path / "one")
    assert_same_run(tmp_path / "one", tmp_path / "two", said)


@pytest.mark.long
def test_one_launch_can_train_twice(arguments: list[str], tmp_path: Path) -> None:
    together(arguments, tmp_path / "first", tmp_path / "second")
    one, two = (load_file(tmp_path / name / LORA_FILE) for name in ("first", "second"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def assert_same_run(one: Path, two: Path, said: str) -> None:
    assert_alike(one, two)
    losses = [[event["loss"] for event in RunDir(run).events() if event["event"] == "step"] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[1]) == 3, "only one process writes the log, and each step is done once"
    assert said.count("3 images, captions 3/3") == 1, "only one process speaks"


@pytest.mark.long
def test_a_process_that_fails_ends_all_with_its_error(arguments: list[str], tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    assert launched([*arguments, f"--output_dir={tmp_path / 'run'}", "--resolution=36"], said) != 0
    assert "resolution=36 must be a multiple of 16" in said.read_text(encoding="utf-8")


@pytest.mark.long
def test_two_processes_save_and_resume(arguments: list[str], by_launcher: tuple[Path, str], tmp_path: Path) -> None:
    run = shutil.copytree(by_launcher[0], tmp_path / "run")
    whole = load_file(run / LORA_FILE)
    together([*arguments, "--checkpointing_steps=2", "--resume_from_checkpoint=latest"], run)
    assert all(torch.equal(value, whole[name]) for name, value in load_file(run / LORA_FILE).items())
    steps = [event["step"] for event in RunDir(run).events() if event["event"] == "step"]
    assert steps == [0, 1, 2, 2]
    assert json.loads((run / "config.json").read_text())["seed"] == 1
