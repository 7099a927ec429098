"""Runs, seen through files and processes: real trainings as subprocesses, and folders made by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from patience import HANGS, wait_until

from app.compare.comparison import _pair_by_name
from app.process.database import Label
from app.process.json_file import read_json
from app.process.processes import Trainers, identity, is_alive, kill_tree
from app.runs.runs import Run, RunStore
from app.settings import AppSettings
from flatlora_diffusion.compare.arms import parse_arm, plan_runs
from flatlora_diffusion.compare.controls import make_controls
from flatlora_diffusion.config import ConfigError, TrainConfig, preset_file
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.run_dir import LORA_FILE

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(base: Path, icons: Path) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": str(icons),
        "max_train_steps": 4,
        "train_batch_size": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "seed": 3,
    }


def begin(runs: RunStore, name: str, settings: dict[str, Any]) -> str:
    run_id = runs.paths.reserve(name)
    runs.start(run_id, settings, runs.paths.next_launch(run_id))
    return run_id


def go_on(runs: RunStore, run_id: str) -> None:
    runs.start(run_id, runs.resume_settings(run_id), runs.paths.next_launch(run_id))


def wait(runs: RunStore, run_id: str, until: Callable[[Run], bool]) -> Run:
    def found() -> Run | None:
        run = runs.get(run_id)
        return run if until(run) else None

    return wait_until(found, told=lambda: (runs.get(run_id), runs.log(run_id)))


def ended(run: Run) -> bool:
    return run.state != "running"


def stepped(run: Run) -> bool:
    assert run.state == "running", run
    return run.progress.step >= 2


def made_by_hand(runs: RunStore, run_id: str, *events: dict[str, Any], **config: Any) -> Path:
    """A run folder as a command line leaves it."""
    folder = runs.folder / run_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"max_train_steps": 10, "method": "lora", **config}))
    (folder / "manifest.json").write_text("[]")
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def step(number: int, loss: float = 0.5) -> dict[str, Any]:
    return {"event": "step", "step": number, "loss": loss, "seconds": 2.0, "eta": 1.0, "memory": 7}


def test_a_training_from_its_start_to_its_files(runs: RunStore, settings: dict[str, Any]) -> None:
    previews = {"validation_prompt": "an icon", "num_validation_images": 1}
    run_id = begin(runs, "Löwe / 3D!", settings | previews)
    assert run_id == "Löwe-3D"
    assert runs.get(run_id).state == "running"
    run = wait(runs, run_id, ended)
    assert (run.state, run.exit_code, run.advice, run.log) == ("finished", 0, "", ()), runs.log(run_id)
    assert (run.progress.step, run.progress.total, run.progress.fraction) == (4, 4, 1.0)
    assert run.progress.seconds_per_step is not None
    assert [number for number, _ in runs.events(run_id).losses()] == [0, 1, 2, 3]
    assert [(one.step, one.path.is_file()) for one in runs.events(run_id).previews()] == [
        (0, True),
        (3, True),
        (4, True),
    ]
    assert {kind: path.name for kind, path in runs.exports(run_id).items()} == {
        "diffusers": "pytorch_lora_weights.safetensors",
        "kohya": "Löwe-3D.safetensors",
        "model_card": "README.md",
    }
    assert any("LoRA saved in" in line for line in runs.log(run_id))
    assert runs.clone_settings(run_id)["instance_data_dir"] == settings["instance_data_dir"]
    assert not {"output_dir", "resume_from_checkpoint"} & runs.clone_settings(run_id).keys()
    assert runs.paths.reserve("Löwe / 3D!") == "Löwe-3D-2"


LOOK = """
import sys
from pathlib import Path
from app.runs.runs import RunStore
runs = RunStore(Path(sys.argv[1]))
print(runs.get("long").state, runs.get("long").progress.step > 0)
runs.save_now("long")
runs.stop("long")
"""


@pytest.mark.long
def test_another_app_process_sees_the_run_and_stops_it_and_it_goes_on(
    runs: RunStore, settings: dict[str, Any]
) -> None:
    begin(runs, "long", settings | {"max_train_steps": 10_000})
    wait(runs, "long", stepped)
    look = [sys.executable, "-c", LOOK, str(runs.folder)]
    assert subprocess.run(look, cwd=ROOT, text=True, capture_output=True, check=True).stdout == "running True\n"
    run = wait(runs, "long", ended)
    assert (run.state, run.exit_code, run.is_resumable) == ("stopped", 3, True)
    assert run.advice == f"Resume continues from {run.checkpoints[-1]}."
    assert not (run.folder / "stop").exists()
    runs.start(
        "long",
        runs.resume_settings("long") | {"max_train_steps": run.progress.step + 2},
        runs.paths.next_launch("long"),
    )
    assert wait(runs, "long", ended).state == "finished", runs.log("long")
    assert len(runs.events("long").losses()) == run.progress.step + 2


@pytest.mark.long
def test_a_stop_before_the_first_step_is_not_forgotten(runs: RunStore, settings: dict[str, Any]) -> None:
    begin(runs, "early", settings | {"max_train_steps": 10_000})
    runs.stop("early")
    run = wait(runs, "early", ended)
    assert (run.state, run.progress.step < 100) == ("stopped", True)


def test_a_run_can_be_ended_at_once_and_starts_without_the_login(
    runs: RunStore, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLATLORA_AUTH", "ann:secret")
    begin(runs, "oops", settings)
    launch = runs.paths.last_launch("oops")
    assert launch is not None
    if sys.platform == "linux":
        supervisor = psutil.Process(read_json(launch.supervisor_file)["pid"])
        assert "FLATLORA_AUTH" not in supervisor.environ()
    runs.stop("oops", immediately=True)
    run = wait(runs, "oops", ended)
    assert (run.state, run.is_resumable) == ("stopped", False)
    assert run.advice == "No checkpoint was saved, so start it again from a clone."


@pytest.mark.long
def test_a_killed_trainer_is_a_failed_run_that_can_be_resumed(runs: RunStore, settings: dict[str, Any]) -> None:
    begin(
        runs, "killed", settings | {"max_train_steps": 10_000, "checkpointing_steps": 1, "checkpoints_total_limit": 2}
    )
    wait(runs, "killed", lambda run: len(run.checkpoints) == 2)
    launch = runs.paths.last_launch("killed")
    assert launch is not None
    kill_tree(read_json(launch.trainer_file))
    run = wait(runs, "killed", ended)
    assert (run.state, run.is_resumable) == ("failed", True)
    if sys.platform != "win32":
        assert run.exit_code == -9
        assert "killed, most often by the system because memory ran out" in run.advice
    assert f"Resume continues from {run.checkpoints[-1]}." in run.advice
    assert 0 < len(run.log) <= 40
    assert any("%|" in line for line in run.log)
    go_on(runs, "killed")
    wait(runs, "killed", lambda now: now.progress.step > run.progress.step + 1)
    supervisor = read_json(runs.paths.last_launch("killed").supervisor_file)  # type: ignore[union-attr]
    kill_tree(supervisor)  # and the trainer with it, as when the computer is switched off
    run = wait(runs, "killed", ended)
    assert (run.state, run.exit_code, run.is_resumable) == ("interrupted", None, True)
    assert "does not run any more and has not finished" in run.advice
    assert run.log


@pytest.mark.long
def test_a_trainer_whose_supervisor_is_gone_still_runs(runs: RunStore, settings: dict[str, Any]) -> None:
    begin(runs, "orphan", settings | {"max_train_steps": 10_000})
    wait(runs, "orphan", stepped)
    launch = runs.paths.last_launch("orphan")
    assert launch is not None
    psutil.Process(read_json(launch.supervisor_file)["pid"]).kill()
    time.sleep(0.3)
    assert runs.get("orphan").state == "running"
    runs.stop("orphan")
    assert wait(runs, "orphan", ended).state == "stopped"


@pytest.mark.parametrize(
    "command",
    [
        ["python", "train_dreambooth_flatlora.py"],
        ["python", "-m", "flatlora_diffusion", "train"],
        ["/env/bin/python", "/env/bin/flatlora", "train"],
        ["/env/Scripts/flatlora.exe", "train"],
        ["python", "-m", "accelerate.commands.launch", "-m", "flatlora_diffusion", "train"],
    ],
    ids=lambda command: command[-2],
)
def test_each_way_to_start_a_training_is_known(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    def seen(*arguments: str) -> list[Any]:
        process = SimpleNamespace(info={"cmdline": [*command, *arguments]}, cwd=os.getcwd, pid=os.getpid())
        return [process]

    monkeypatch.setattr(psutil, "process_iter", lambda names: seen("--output_dir", "here/mine"))
    trainers = Trainers()
    assert trainers.is_training_in(Path("here/mine"))
    assert not trainers.is_training_in(Path("here"))


@pytest.mark.long
def test_a_run_that_was_started_from_a_command_line(runs: RunStore, settings: dict[str, Any]) -> None:
    folder = runs.folder / "demo" / "lora"
    config = runs.folder.parent / "mine.json"
    config.write_text(json.dumps(settings | {"max_train_steps": 10_000, "output_dir": str(folder)}))
    process = subprocess.Popen(
        [sys.executable, "-m", "flatlora_diffusion", "train", "--config", str(config)], cwd=ROOT
    )
    try:
        wait_until(lambda: any(map(stepped, runs.all())), lambda: process.poll() is None)
        assert [run.id for run in runs.all()] == ["demo/lora"]
        with pytest.raises(ConfigError, match="started from a command line"):
            runs.stop("demo/lora", immediately=True)
        runs.stop("demo/lora")
        assert process.wait(HANGS) == 3
    finally:
        process.kill()
    assert wait(runs, "demo/lora", ended).state == "stopped"


def test_wrong_settings_fail_with_their_sentence(runs: RunStore, settings: dict[str, Any]) -> None:
    run_id = begin(runs, "wrong", settings | {"instance_data_dir": "no/such/folder"})
    run = wait(runs, run_id, ended)
    assert (run.state, run.exit_code, run.is_resumable) == ("failed", 2, False)
    assert run.advice.startswith("image folder no/such/folder does not exist\nCorrect this setting")
    assert "error: image folder no/such/folder does not exist" in run.log
    assert [one.id for one in runs.all()] == [run_id]
    with pytest.raises(ConfigError, match="wrong cannot be resumed: no checkpoint was saved"):
        runs.resume_settings(run_id)
    with pytest.raises(ConfigError, match="wrong does not run; it is failed"):
        runs.stop(run_id)
    with pytest.raises(ConfigError, match="rank=0 is out of range"):
        begin(runs, "other", settings | {"rank": 0})
    with pytest.raises(ConfigError, match="hub_token would be saved"):
        begin(runs, "other", settings | {"hub_token": "hf_secret"})
    assert not any("hf_secret" in path.read_text() for path in runs.private.rglob("*.json"))


def test_states_of_runs_from_elsewhere_come_from_their_files(runs: RunStore) -> None:
    finished = made_by_hand(runs, "finished", step(9), {"event": "finished", "step": 10})
    (finished / "pytorch_lora_weights.safetensors").touch()
    lost = made_by_hand(runs, "lost", step(9), {"event": "finished", "step": 10})
    (lost / "a base that lies there.safetensors").touch()
    made_by_hand(runs, "stopped", step(3), {"event": "stopped", "step": 4, "reason": "SIGINT"})
    (made_by_hand(runs, "gone", step(3)) / "checkpoint-4").mkdir()
    made_by_hand(runs, "again", {"event": "stopped", "step": 4, "reason": "SIGINT"}, step(4))
    (runs.folder / "a model").mkdir()
    (runs.folder / "a model" / "config.json").write_text("{}")
    (runs.folder / "loose file").touch()
    states = {run.id: (run.state, run.is_resumable) for run in runs.all()}
    assert states == {
        "finished": ("finished", False),
        "lost": ("failed", False),
        "stopped": ("stopped", False),
        "gone": ("interrupted", True),
        "again": ("interrupted", False),
    }


def test_progress_follows_events_that_were_done_again_and_half_lines(runs: RunStore) -> None:
    folder = made_by_hand(runs, "run", step(0, 1.0), step(1, 0.9), step(2, 0.8), step(1, 0.7))
    progress = runs.get("run").progress
    assert (progress.step, progress.total, progress.seconds_per_step) == (2, 10, 2.0)
    assert progress.eta_seconds == 16.0
    assert runs.events("run").losses() == [(0, 1.0), (1, 0.7), (2, 0.8)]
    with open(folder / "events.jsonl", "a") as file:
        file.write('{"event": "step", "st')
    assert runs.get("run").progress.step == 2
    with open(folder / "events.jsonl", "a") as file:
        file.write('ep": 2, "loss": 0.1, "seconds": 2.0}\n{"event": "preview", "step": 3, "images": ["../x.png"]}\n')
    assert runs.get("run").progress.step == 3
    assert [(one.step, one.path) for one in runs.events("run").previews()] == [(3, folder / "images" / "x.png")]
    with open(folder / "events.jsonl", "a") as file:  # a line that a full disk cut off, and the one after it
        file.write('{"event": "st{"event": "step"}\n' + json.dumps(step(3, 0.3)) + "\n")
    assert runs.get("run").progress.step == 4
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "validation", "step": 4, "loss": 0.4}) + "\n")
        file.write(json.dumps({"event": "resumed", "step": 1}) + "\n")
    assert runs.get("run").progress.step == 1, "what is to be done again counts no more"
    assert (runs.events("run").losses(), runs.events("run").validation_losses()) == ([(0, 1.0)], [])
    (folder / "events.jsonl").write_text(json.dumps(step(0, 5.0)) + "\n")
    assert runs.events("run").losses() == [(0, 5.0)]


def test_a_recycled_process_number_is_not_taken_for_the_trainer() -> None:
    mine = identity(os.getpid())
    assert is_alive(mine)
    assert not is_alive(mine | {"created": mine["created"] - 60})
    assert not is_alive({})
    assert identity(2**22 + 1) == {}


@pytest.mark.parametrize(
    "run_id",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "/etc",
        "a/b/../c",
        "a/" * 8 + "a",
        "a//b",
        "a\\b",
        "C:x",
        "a\x00",
        ".app",
        ".trash/x",
        "x/..",
    ],
)
def test_a_run_name_never_leaves_the_runs_folder(runs: RunStore, run_id: str) -> None:
    made_by_hand(runs, "../x")
    for call in (runs.get, runs.stop, runs.delete, runs.exports, runs.size, runs.events, runs.settings):
        with pytest.raises(ConfigError, match="is not the name of a run"):
            call(run_id)
    with pytest.raises(ConfigError, match="is not the name of a run"):
        runs.rename(run_id, "x")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_link_out_of_the_runs_folder_is_no_run(runs: RunStore, tmp_path: Path) -> None:
    outside = RunStore(tmp_path / "outside")
    made_by_hand(outside, "secret")
    (runs.folder / "link").symlink_to(outside.folder / "secret", target_is_directory=True)
    (runs.folder / "a" / "b").mkdir(parents=True)
    (runs.folder / "a" / "b" / "out").symlink_to(outside.folder, target_is_directory=True)
    (runs.folder / "a" / "b" / "loop").symlink_to(runs.folder, target_is_directory=True)
    assert runs.all() == []
    for run_id in ("link", "a/b/out/secret"):
        for call in (runs.get, runs.delete, runs.settings, runs.exports, runs.size):
            with pytest.raises(ConfigError, match="is not the name of a run"):
                call(run_id)
    assert (outside.folder / "secret" / "config.json").is_file()


def test_the_runs_of_make_demo_are_listed_where_the_app_looks(runs: RunStore) -> None:
    preset = TrainConfig.from_dict(read_json(preset_file("demo")))
    default = Path(AppSettings().runs_dir)
    arms = [parse_arm("lora"), parse_arm("flat-lora")]
    arms += [null.arm for null in make_controls(arms, 0)]
    ids = [planned.run.folder.relative_to(default).as_posix() for planned in plan_runs(preset, arms, [0], 4)]
    assert ids[:2] == ["demo/lora/seed-0", "demo/flat-lora/seed-0"]
    for run_id in ids:
        made_by_hand(runs, run_id, step(9))
        (runs.folder / run_id).with_suffix(".json").write_text("{}")
    assert {run.id for run in runs.all()} == set(ids)
    assert _pair_by_name(ids[1]) == _pair_by_name(ids[0]) == ids[:2]
    runs.rename(ids[0], "first")
    runs.note(ids[0], "mine")
    assert (runs.get(ids[0]).name, runs.size(ids[0]) > 0, len(runs.events(ids[0]).losses())) == ("first", True, 1)
    key = runs.delete(ids[0])
    assert {run.id for run in runs.all()} == set(ids[1:])
    assert runs.trash.undo(key) == ids[0]
    assert runs.get(ids[0]).label.note == "mine"


def test_runs_are_found_at_any_depth_and_inside_of_others(runs: RunStore) -> None:
    deep = "/".join("abcdefgh")
    for run_id in ("demo", "demo/lora/seed-0", "sweeps/2026/rank 8/lora/seed-1", deep):
        made_by_hand(runs, run_id)
    hidden = (
        f"{deep}/i",
        "demo/earlier-1",
        "demo/images/x",
        "demo/checkpoint-4/x",
        ".cache/x",
        "x/.y/z",
        "a:b",
        "x" * 241,
    )
    for run_id in hidden:
        made_by_hand(runs, run_id)
    assert {run.id for run in runs.all()} == {"demo", "demo/lora/seed-0", "sweeps/2026/rank 8/lora/seed-1", deep}
    with pytest.raises(ConfigError, match="demo has other runs in its folder, demo/lora/seed-0; delete those first"):
        runs.delete("demo")
    runs.delete("demo/lora/seed-0")
    runs.delete("demo")
    assert not (runs.folder / "demo").exists()


def test_looking_for_runs_ends_in_a_folder_without_end(runs: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.runs.names._MAX_FOLDERS", 20)
    for number in range(50):
        (runs.folder / "data" / f"{number}" / "more").mkdir(parents=True)
    made_by_hand(runs, "zz")
    made_by_hand(runs, "zz/lora")
    assert {run.id for run in runs.all()} == {"zz", "zz/lora"}


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "con", "a\x00b", "...", "", " ", "x" * 300, ".app"])
def test_any_name_makes_a_new_folder_inside(runs: RunStore, name: str) -> None:
    first, second = runs.paths.reserve(name), runs.paths.reserve(name)
    assert first != second
    assert (runs.folder / first).resolve().parent == runs.folder.resolve()
    assert not first.startswith(".")
    runs.paths.release(first)
    assert runs.paths.reserve(name) == first


def test_names_tags_and_notes(runs: RunStore) -> None:
    made_by_hand(runs, "run")
    runs.rename("run", " My icons ")
    runs.tag("run", "good", " 3d", "good", "")
    runs.note("run", "bright")
    run = RunStore(runs.folder).get("run")
    assert (run.name, run.label.tags, run.label.note) == ("My icons", ("good", "3d"), "bright")
    for own in ("", "run"):
        runs.rename("run", own)
        assert runs.get("run").label.name is None
    assert runs.get("run").name == "run"
    with pytest.raises(ConfigError, match="there is no run 'none'"):
        runs.tag("none", "x")


def test_a_deleted_run_comes_back_whole(runs: RunStore) -> None:
    folder = made_by_hand(runs, "demo/lora", step(0))
    runs.note("demo/lora", "mine")
    launch = runs.paths.next_launch("demo/lora")
    launch.folder.mkdir(parents=True)
    launch.log_file.write_text("a line\n")
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    key = runs.delete("demo/lora")
    assert runs.all() == []
    with pytest.raises(ConfigError, match="there is no run 'demo/lora'"):
        runs.get("demo/lora")
    assert [entry.run for entry in RunStore(runs.folder).trash.entries()] == ["demo/lora"]
    made_by_hand(runs, "demo/lora")
    with pytest.raises(ConfigError, match="there is another run 'demo/lora' now"):
        runs.trash.undo(key)
    second = runs.delete("demo/lora")
    assert runs.trash.undo(key) == "demo/lora"
    assert {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (runs.log("demo/lora"), runs.get("demo/lora").label.note) == (["a line"], "mine")
    runs.trash.delete_for_good(second)
    assert runs.trash.entries() == []
    assert list((runs.folder / ".trash").iterdir()) == []
    for gone in (key, second, "../demo"):
        with pytest.raises(ConfigError, match="not in the trash"):
            runs.trash.undo(gone)


def test_a_folder_with_an_earlier_run_in_it_is_one_run(runs: RunStore) -> None:
    folder = made_by_hand(runs, "run")
    (folder / "earlier-1").mkdir()
    for name in ("config.json", "manifest.json"):
        (folder / name).rename(folder / "earlier-1" / name)
    assert runs.all() == []
    made_by_hand(runs, "other/earlier-1")
    made_by_hand(runs, "third/holdout-fold-1")
    made_by_hand(runs, "fourth/member-1")
    assert runs.all() == []


@pytest.mark.parametrize("kept", ["checkpoint-1/state.safetensors", LORA_FILE])
def test_a_run_that_was_stopped_in_its_members_goes_on_with_them(runs: RunStore, kept: str) -> None:
    launch = runs.paths.next_launch(runs.paths.reserve("run"))
    launch.folder.mkdir(parents=True)
    write_json(launch.settings_file, {"members": 2, "method": "lora"})
    write_json(launch.exit_file, {"code": 3, "was_asked": True, "time": time.time()})
    assert not runs.get("run").is_resumable
    file = runs.folder / "run" / "member-1" / kept
    file.parent.mkdir(parents=True)
    file.touch()
    run = runs.get("run")
    assert (run.state, run.is_resumable, run.advice) == ("stopped", True, "Resume continues from its members.")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("x" * 61, "the name has 61 letters; 60 at most"),
        ("abc\u202edef", r"the name has the character U\+202E, which cannot be seen"),
        ("zero\u200bwidth", r"U\+200B"),
        ("two\nlines", r"U\+000A"),
    ],
)
def test_a_name_is_short_and_looks_like_what_it_is(runs: RunStore, name: str, sentence: str) -> None:
    made_by_hand(runs, "run")
    with pytest.raises(ConfigError, match=sentence):
        runs.rename("run", name)
    with pytest.raises(ConfigError, match="the list of tags has"):
        runs.tag("run", "fine", "x" * 2001, "y")
    with pytest.raises(ConfigError, match=r"the note has 2001 letters"):
        runs.note("run", "x" * 2001)
    runs.rename("run", "Füchse 狐 (rot)")
    runs.note("run", "two\nlines")
    assert runs.get("run").label == Label("Füchse 狐 (rot)", (), "two\nlines")


def test_a_folder_whose_name_cannot_be_seen_is_no_run_and_hides_no_other(runs: RunStore) -> None:
    for name in ("fine", "gpj.\u202eexe", "zero\u200bwidth", "a:b"):
        (runs.folder / name).mkdir(parents=True)
        for file in ("config.json", "manifest.json"):
            (runs.folder / name / file).write_text("{}")
    assert [run.id for run in runs.all()] == ["fine"]
    with pytest.raises(ConfigError, match="is not the name of a run"):
        runs.get("zero\u200bwidth")
