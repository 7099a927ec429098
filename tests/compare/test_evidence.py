"""`evidence`: what it takes is told before, its notebook runs, and its figures name nobody."""

from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.compare import evidence
from flatlora_diffusion.compare.arms import run_folder
from flatlora_diffusion.config import CompareConfig, ConfigError, TrainConfig
from flatlora_diffusion.storage.run_dir import RunDir

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "evidence.ipynb"


def arguments(base: Path, icons: Path, tmp_path: Path) -> list[str]:
    """A comparison of two steps on the tiny random base."""
    heldout = tmp_path / "Jane Doe's pictures"
    heldout.mkdir()
    Image.new("RGB", (40, 40), "red").save(heldout / "passport.png")
    (heldout / "passport.txt").write_text("an icon of Jane")
    flags = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": icons,
        "instance_prompt": "an icon of Jane",
        "heldout_dir": heldout,
        "output_dir": tmp_path / "janes_run",
        "output_name": "jane",
        "resolution": 32,
        "max_train_steps": 2,
        "num_seeds": 1,
        "num_checkpoints": 1,
        "num_prompts": 1,
        "pictures_per_prompt": 1,
        "encoders": "judge",
        "report_to": "none",
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


@pytest.mark.long
def test_the_notebook_runs_and_its_figures_name_nobody(
    base: Path, icons: Path, tmp_path: Path, without_a_process: None, capsys: Any, caplog: Any
) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    with caplog.at_level("INFO"):
        for cell in cells:
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", []):
                names["ARGUMENTS"] = arguments(base, icons, tmp_path)
    text = (tmp_path / "janes_run" / "evidence.json").read_text()
    found = json.loads(text)
    for personal in ("jane", "passport", str(tmp_path), base.name, getpass.getuser(), platform.node()):
        assert personal.lower() not in text.lower(), personal
    assert {run["arm"] for run in found["runs"]} >= {"lora", "flat-lora", "sigma-0"}
    assert all(run["steps"] == 2 and run["memory"] and run["seconds"] > 0 for run in found["runs"])
    assert set(found["values"]) >= {"lora", "flat-lora", "sigma-0"}
    assert found["settings"]["rank"] == 4
    assert found["settings"]["pretrained_model_name_or_path"] == "another one"
    assert found["is_alike"]
    assert "5 trainings in all" in caplog.text
    assert f"on disk in {tmp_path / 'janes_run'}" in caplog.text, "the disk is told"
    assert "on this machine" in caplog.text, "the time is told"
    assert found["verdict"] in capsys.readouterr().out


@pytest.mark.parametrize(
    "form", ["--output_dir {}", "--output_dir={}", "--output-dir={}", "--output_dir a --output_dir={}"]
)
def test_the_notebook_finds_the_figures_in_each_form_of_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    figures = {"verdict": "no difference found", "device": "a GPU", "runs": [{"arm": "lora", "seed": 0, "seconds": 6}]}
    (tmp_path / "evidence.json").write_text(json.dumps(figures))
    *_, last = (cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code")
    exec("".join(last["source"]), {"ARGUMENTS": ["--num_seeds", "1", *form.format(tmp_path).split(" ")]})
    assert capsys.readouterr().out.splitlines() == ["no difference found", "a GPU", "lora 0: 6 s"]


def test_only_the_runs_of_the_result_count_and_each_step_of_them_once(tmp_path: Path) -> None:
    arms: dict[str, Any] = {"lora": {"0": {}}, "flat-lora:sigma=0.2": {"0": {}}}
    settings = {"pretrained_model_name_or_path": "tiny", "encoders": ["judge"], "arms": list(arms)}
    empty = dict.fromkeys(("device", "versions", "seeds", "verdict", "metrics", "base", "paired", "trajectories"), "")
    result = {**empty, "settings": settings, "values": arms, "nulls": [], "proof": []}
    (tmp_path / "compare.json").write_text(json.dumps(result))
    for arm, seed in (("lora", 0), ("flat-lora:sigma=0.2", 0), ("lora", 1), ("sam", 0)):
        run = RunDir(run_folder(tmp_path, arm, seed))
        run.folder.mkdir(parents=True)
        for step in (0, 1, 2, "killed", 1, 2):
            told = {"event": "step", "step": step, "seconds": 2.0, "memory": 5, "loss": 0.5}
            run.add_event({"event": "resumed", "step": 1} if step == "killed" else told)
    runs = evidence.public_figures(tmp_path)["runs"]
    assert [(run["arm"], run["seed"]) for run in runs] == [("lora", "seed-0"), ("flat-lora-sigma-0.2", "seed-0")]
    for run in runs:
        assert (run["steps"], run["seconds"], run["losses"]) == (3, 6.0, [0.5] * 3)


def test_only_what_is_not_here_is_downloaded() -> None:
    config = TrainConfig().replace(pretrained_model_name_or_path=evidence.BASE)
    assert "about 8.9 GB first" in evidence.downloads(config, CompareConfig(encoders=evidence.ENCODERS))
    assert evidence.downloads(TrainConfig(), CompareConfig()) == ""


def test_a_setting_that_is_a_text_is_not_told(tmp_path: Path) -> None:
    values = {**TrainConfig().to_dict(), "encoders": [str(tmp_path)], "arms": ["lora"], "token_abstraction": "JANE"}
    public = evidence._public_settings(values)
    assert public["encoders"] == ["another one"]
    assert public["perturb_per"] == "microbatch"
    assert not {"token_abstraction", "instance_prompt", "output_dir", "hub_model_id"} & {
        name for name, value in public.items() if value is not None
    }


def test_flags_win_over_what_evidence_has_as_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def stop(config: TrainConfig, own: CompareConfig) -> Path:
        seen.extend((config, own))
        raise ConfigError("enough")

    monkeypatch.setattr(evidence, "evidence", stop)
    assert main(["evidence", "--num_seeds", "5", "--max_train_steps", "7", "--encoders", "judge"]) == 2
    config, own = seen
    assert (own.num_seeds, own.encoders) == (5, ("judge",))
    assert (config.optim.max_train_steps, config.data.resolution) == (7, 1024)
    assert (config.model.pretrained_model_name_or_path, config.model.variant) == (evidence.BASE, "fp16")
    assert Path(config.data.instance_data_dir).name == "icons_3d"
