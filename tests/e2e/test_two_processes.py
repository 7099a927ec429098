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
from safetensors.torch import load_file

from flatlora_diffusion.commands.command_line import train_main
from flatlora_diffusion.ground.run_dir import RunDir
from flatlora_diffusion.lora_files.diffusers_file import LORA_FILE

ROOT = Path(__file__).parents[2]


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = ROOT / "samples" / "presets" / "accelerate" / "two_cpu_processes.yaml"
    launcher = ["-m", "accelerate.commands.launch", f"--config_file={config}", f"--main_process_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [sys.executable, *launcher, "train_dreambooth_flatlora.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def alone(arguments: list[str], folder: Path) -> None:
    """The same run of one process, this one."""
    assert train_main([*arguments, "--gradient_accumulation_steps=2", f"--output_dir={folder}"]) == 0


def assert_alike(one: Path, two: Path) -> None:
    a, b = load_file(one / LORA_FILE), load_file(two / LORA_FILE)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-5)


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
def together(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run of two processes with a checkpoint before its end, and what they said; to be copied."""
    run = tmp_path_factory.mktemp("together") / "run"
    done = launch(*arguments, f"--output_dir={run}", "--checkpointing_steps=2")
    assert done.returncode == 0, done.stderr
    return run, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["--method=sam --adapter=lora-ga", "--method=bi-lora --adapter=pissa"])
def test_what_ascends_does_so_alike_on_two_processes_and_on_one(
    arguments: list[str], tmp_path: Path, flags: str
) -> None:
    """Slopes of frozen weights and of the second LoRA are no part of DDP: the method shares them itself."""
    both = [*arguments, *flags.split(), "--rho=0.5"]
    done = launch(*both, f"--output_dir={tmp_path / 'two'}")
    assert done.returncode == 0, done.stderr
    alone(both, tmp_path / "one")
    assert_alike(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("text", [False, True], ids=["unet", "text encoders"])
def test_two_processes_equal_one_with_accumulation(
    arguments: list[str], together: tuple[Path, str], tmp_path: Path, text: bool
) -> None:
    both = arguments
    if text:  # and with it the prior that needs no class images, for which a step calls the model more than once
        both = [argument for argument in arguments if not argument.startswith(("--with_prior", "--class_data"))]
        both += ["--train_text_encoder", "--text_encoder_lr=0.01", "--prior_from_base"]
    folder, said = together
    if text:
        folder = tmp_path / "two"
        two = launch(*both, f"--output_dir={folder}")
        assert two.returncode == 0, two.stderr
        said = two.stderr
    alone(both, tmp_path / "one")
    assert_alike(tmp_path / "one", folder)
    losses = [
        [event["loss"] for event in RunDir(run).events() if event["event"] == "step"]
        for run in (tmp_path / "one", folder)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(losses[1]) == 3, "only one process writes the log"
    assert said.count("3 images, captions 3/3") == 1, "only one process speaks"


@pytest.mark.slow
def test_a_process_that_fails_ends_all_with_its_error(arguments: list[str], tmp_path: Path) -> None:
    done = launch(*arguments, f"--output_dir={tmp_path / 'run'}", "--resolution=36")
    assert done.returncode != 0
    assert "resolution=36 must be a multiple of 16" in done.stderr


@pytest.mark.slow
def test_two_processes_save_and_resume(arguments: list[str], together: tuple[Path, str], tmp_path: Path) -> None:
    run = f"--output_dir={shutil.copytree(together[0], tmp_path / 'run')}"
    whole = load_file(tmp_path / "run" / LORA_FILE)
    again = launch(*arguments, run, "--checkpointing_steps=2", "--resume_from_checkpoint=latest")
    assert again.returncode == 0, again.stderr
    assert all(torch.equal(value, whole[name]) for name, value in load_file(tmp_path / "run" / LORA_FILE).items())
    steps = [event["step"] for event in RunDir(tmp_path / "run").events() if event["event"] == "step"]
    assert steps == [0, 1, 2, 2]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 1


@pytest.mark.slow
def test_two_processes_without_a_seed_draw_one_and_train_together(arguments: list[str], tmp_path: Path) -> None:
    drawn = [argument for argument in arguments if not argument.startswith("--seed")]
    two = launch(*drawn, f"--output_dir={tmp_path / 'two'}")
    assert two.returncode == 0, two.stderr
    seed = json.loads((tmp_path / "two" / "config.json").read_text())["seed"]
    alone([*drawn, f"--seed={seed}"], tmp_path / "again")
    assert_alike(tmp_path / "again", tmp_path / "two")
    steps = [event["step"] for event in RunDir(tmp_path / "two").events() if event["event"] == "step"]
    assert steps == [0, 1, 2], "each process trained a run of its own"
