"""The app's own settings: who is let in; and what it tells of a training before it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import small_disk

from app.__main__ import main
from app.runs.runs import RunStore
from app.settings import parse_settings
from app.train.estimates import estimate_disk, estimate_time, memory_of, total_steps
from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.memory.disk import disk_need

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--share"], "--share"),
        (["--host", "0.0.0.0"], "host='0.0.0.0'"),
        (["--host", "example.org"], "host='example.org'"),
        (["--auth", "user"], "auth must be user:password"),
        (["--auth", ":password"], "auth must be user:password"),
        (["--auth", "user:"], "auth must be user:password"),
        (["--port", "0"], "port=0 is out of range"),
    ],
)
def test_an_app_open_to_others_without_a_login_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_settings(arguments, {})


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("file", "is a file; give a folder with --runs_dir"),
        ("file/runs", "cannot be made or written to (Not a directory); give a folder with --runs_dir"),
        ("blocked", "cannot be made or written to (File exists); give a folder with --runs_dir"),
        ("spoilt", "has an .app/app.db that cannot be used (file is not a database); move that file away"),
    ],
)
def test_a_runs_folder_that_cannot_be_one_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, sentence: str
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / ".app").write_text("mine")
    (tmp_path / "spoilt" / ".app").mkdir(parents=True)
    (tmp_path / "spoilt" / ".app" / "app.db").write_text("mine" * 1000)
    assert main(["--runs_dir", str(tmp_path / place)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: runs_dir={str(tmp_path / place)!r} {sentence}"), told
    assert told.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_login_comes_from_a_flag_or_the_environment_and_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {"FLATLORA_AUTH": "ann:hid:den"}
    settings = parse_settings(["--share", "--host", "0.0.0.0"], environment)
    assert settings.login == ("ann", "hid:den")
    assert "hid" not in repr(settings)
    assert parse_settings(["--auth", "bob:pw"], environment).login == ("bob", "pw")
    for host in ("localhost", "::1", "127.0.0.2"):
        assert parse_settings(["--host", host], {}).host == host
    with pytest.raises(SystemExit):
        parse_settings(["--help"], environment)
    shown = capsys.readouterr().out
    assert "--share" in shown
    assert "hid" not in shown


def test_time_is_that_of_the_last_run_alike(tmp_path: Path) -> None:
    runs = RunStore(tmp_path / "runs")
    config = TrainConfig.from_dict({"max_train_steps": 100, "method": "lora"})
    assert estimate_time(config, 10, runs) is None
    for name, method, batch, seconds in (("a", "lora", 4, 1.0), ("b", "flat-lora", 4, 3.0), ("c", "lora", 1, 0.1)):
        folder = runs.folder / name
        folder.mkdir()
        saved = config.replace(method=method, train_batch_size=batch, resolution=64).to_dict()
        (folder / "config.json").write_text(json.dumps(saved))
        (folder / "manifest.json").write_text("[]")
        event = {"event": "step", "step": 0, "loss": 1.0, "seconds": seconds, "eta": 0.0}
        (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    found = estimate_time(config, 10, runs)
    assert found is not None
    assert (found.run, found.seconds, found.seconds_per_step, found.steps) == ("a", 100.0, 1.0, 100)
    flat = estimate_time(config.replace(method="flat-lora", max_train_steps=None, num_train_epochs=3), 9, runs)
    assert flat is not None
    assert (flat.run, flat.steps, flat.seconds) == ("b", 9, 27.0)
    sam = estimate_time(config.replace(method="sam"), 10, runs)
    assert sam is not None
    assert sam.seconds_per_step == pytest.approx({"a": 1.0 * 6 / 2.5, "b": 3.0 * 6 / 2.75}[sam.run])
    several = estimate_time(config.replace(members=3), 10, runs)
    assert several is not None
    assert several.steps == 300
    assert estimate_time(config.replace(resolution=128), 10, runs) is None
    assert estimate_time(config.replace(gradient_checkpointing=True), 10, runs) is None
    assert total_steps(config.replace(max_train_steps=None, repeats=2, gradient_accumulation_steps=2), 9) == 3


def test_memory_and_disk_are_counted(base: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict(
        {"pretrained_model_name_or_path": str(base), "max_train_steps": 1000, "save_dtype": "fp32"}
    )
    memory = memory_of(config)
    assert memory is not None
    assert 0 < memory.lora < memory.total
    assert memory_of(config.replace(lora_target_modules="no_such_layer")) is None
    need = disk_need(config)
    assert estimate_disk(config, 10, tmp_path).needed == 2 * need.checkpoint + need.result, "of steps 500 and 1000"
    assert estimate_disk(config, 10, tmp_path).is_enough
    limited = config.replace(checkpoints_total_limit=1)
    assert estimate_disk(limited, 10, tmp_path).needed == need.checkpoint + need.result
    several = estimate_disk(config.replace(members=3), 10, tmp_path).needed
    assert several == 3 * (2 * need.checkpoint + need.result) + 3 * need.result


def test_a_disk_that_is_too_small_is_not_enough(base: Path, tmp_path: Path) -> None:
    config = TrainConfig.from_dict({"pretrained_model_name_or_path": str(base), "max_train_steps": 10})
    with small_disk(tmp_path / "disk", disk_need(config).checkpoint // 1024) as disk:
        assert not estimate_disk(config, 10, disk).is_enough


def test_the_backend_starts_without_torch() -> None:
    program = (
        "import sys, app.queue.queue, app.uploads.uploads, app.settings, app.train.estimates, app.process.supervise\n"
        "print(sorted({'torch', 'diffusers', 'gradio', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
