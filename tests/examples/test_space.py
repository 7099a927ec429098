"""The Space as files: what the platform reads of it, and the runs that it shows."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from app.runs.runs import RunStore
from app.settings import parse_settings
from examples.space.app import RUNS, flags
from examples.space.make_runs import SHIPPED, TRAININGS
from flatlora_diffusion.storage.run_dir import LORA_FILE

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"
LOCKED = dict(
    line.split("==") for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if "==" in line
)


def test_the_front_matter_names_the_app_and_the_gradio_that_was_tested() -> None:
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    values = yaml.safe_load(front)
    assert (SPACE / values["app_file"]).is_file()
    assert (values["sdk"], values["sdk_version"]) == ("gradio", LOCKED["gradio"])
    assert values["license"] == "apache-2.0"
    assert len(values["short_description"]) <= 60
    assert {values["colorFrom"], values["colorTo"]} <= {
        *("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"),
    }


def test_it_installs_what_the_program_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith(("#", "--"))] == project["dependencies"]
    (app,) = project["optional-dependencies"]["app"]
    assert app.startswith("gradio>="), "which the Space has by its sdk_version"


def test_it_is_read_only_and_answers_to_the_name_of_the_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE_HOST", "me-mine.hf.space")
    settings = parse_settings(flags(RUNS), {})
    assert (settings.read_only, settings.login, settings.share) == (True, None, False)
    assert (settings.host, settings.port) == ("0.0.0.0", 7860)
    assert "me-mine.hf.space" in settings.allowed_host
    assert settings.framing_site == ("https://huggingface.co",)


def test_its_runs_are_small_and_tell_of_no_machine() -> None:
    files = [path for path in RUNS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(TRAININGS)
    assert {path.name for path in files} == set(SHIPPED)
    assert sum(path.stat().st_size for path in files) < 1.5e6
    for path in files:
        if path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(?<![\w./:-])(/[a-z]+/|[A-Z]:\\|~/)|hf_[A-Za-z]{10}", text), path
    for name in TRAININGS:
        config = json.loads((RUNS / name / "config.json").read_text(encoding="utf-8"))
        assert (config["pretrained_model_name_or_path"], config["seed"], config["rank"]) == ("tiny", 0, 1)
        assert all(weight.isfinite().all() for weight in load_file(RUNS / name / LORA_FILE).values())


def test_the_app_lists_them_with_all_their_steps(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for path in RUNS.iterdir():
        target = tmp_path / path.name
        target.mkdir()
        for file in path.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    found = {run.id: run for run in store.all()}
    assert {run.state for run in found.values()} == {"finished"}
    assert {name: (run.progress.step, run.progress.total) for name, run in found.items()} == {
        "icons-lora": (150, 150),
        "icons-flat-lora": (150, 150),
        "icons-average": (450, 450),
    }
    assert all("diffusers" in store.exports(name) for name in found)
