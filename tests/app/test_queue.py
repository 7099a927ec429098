"""The queue: one job at a time, in order, through failures, stops, restarts and a second app."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from patience import HANGS, wait_until

from app.process.json_file import read_json
from app.process.processes import kill_tree
from app.process.supervise import _pass_on
from app.queue.queue import JobQueue
from app.runs.runs import RunStore
from flatlora_diffusion.config import ConfigError, TrainConfig

ROOT = Path(__file__).parents[2]
QUICK, WRONG = ["generate", "--help"], ["generate", "--no_such_flag"]


@pytest.fixture
def config(base: Path, icons: Path) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "pretrained_model_name_or_path": str(base),
            "instance_data_dir": str(icons),
            "max_train_steps": 10_000,
            "train_batch_size": 1,
            "report_to": "none",
        }
    )


@pytest.fixture
def queue(runs: RunStore) -> Iterator[JobQueue]:
    queue = JobQueue(runs)
    yield queue
    for job in queue.jobs("queued", "running"):
        queue.stop(job.id, immediately=True)
    queue.close()


def tick_until(queue: JobQueue, is_over: Callable[[], object]) -> None:
    def is_over_after_a_tick() -> object:
        assert queue.tick()
        assert len(queue.jobs("running")) <= 1
        return is_over()

    if not is_over():
        wait_until(is_over_after_a_tick, told=queue.jobs)


def states(queue: JobQueue) -> list[tuple[str | None, str]]:
    return [(job.run or job.kind, job.state) for job in queue.jobs()]


def test_jobs_run_one_by_one_and_a_failed_one_holds_nobody_up(queue: JobQueue) -> None:
    jobs = [
        queue.add_command("generate", QUICK, "me"),
        queue.add_command("generate", WRONG, "me"),
        queue.add_command("flatness", ["generate", "-h"], "me"),
    ]
    last = queue.add_command("generate", QUICK, "me")
    queue.put_first(last.id)
    tick_until(queue, lambda: not queue.jobs("queued", "running"))
    ended = queue.jobs()
    assert [job.id for job in ended] == [last.id, *(job.id for job in jobs)]
    assert [(job.state, job.exit_code) for job in ended] == [("done", 0), ("done", 0), ("failed", 2), ("done", 0)]
    times = [job.ended or 0.0 for job in ended]
    assert times == sorted(times)
    assert any("no_such_flag" in line for line in queue.launch_of(jobs[1].id).log())
    with pytest.raises(ConfigError, match="does not wait any more"):
        queue.put_first(last.id)
    queue.stop(last.id)
    assert queue.jobs()[0].state == "done"


def test_heavy_work_lets_the_app_go_first(runs: RunStore) -> None:
    launch = runs.paths.next_launch("nice")
    launch.start(["-c", "import psutil; print(psutil.Process().nice())"])
    wait_until(launch.ending, told=launch.log)
    mine = psutil.Process().nice()
    lower = str(psutil.BELOW_NORMAL_PRIORITY_CLASS) if sys.platform == "win32" else str(min(19, mine + 10))
    assert launch.log() == [lower]


def test_a_pair_differs_in_its_method_alone(queue: JobQueue, runs: RunStore, config: TrainConfig) -> None:
    lora, flat = queue.add_pair(config.replace(sigma=0.05), "icons", "me")
    assert (lora.run, flat.run) == ("icons-lora", "icons-flat-lora")
    assert lora.pair == flat.pair is not None
    assert isinstance(lora.settings, dict)
    assert isinstance(flat.settings, dict)
    assert lora.settings["seed"] is not None
    differing = {name for name in lora.settings if lora.settings[name] != flat.settings[name]}
    assert differing == {"method", "sigma"}
    assert (lora.settings["method"], flat.settings["method"], flat.settings["sigma"]) == ("lora", "flat-lora", 0.05)
    assert [(run.id, run.state) for run in runs.all()] in (
        [("icons-lora", "queued"), ("icons-flat-lora", "queued")],
        [("icons-flat-lora", "queued"), ("icons-lora", "queued")],
    )
    assert runs.clone_settings("icons-lora")["method"] == "lora"
    with pytest.raises(ConfigError, match="icons-lora is queued; stop it before"):
        runs.delete("icons-lora")
    queue.stop(lora.id)
    assert [run.id for run in runs.all()] == ["icons-flat-lora"]
    assert queue.add_training(config, "icons-lora", "me").run == "icons-lora"
    with pytest.raises(ConfigError, match="no images to train on"):
        queue.add_pair(config.replace(instance_data_dir=None), "icons", "me")


APP = """
import os, sys, time
from pathlib import Path
from unittest.mock import Mock
from app.queue.queue import JobQueue
from app.process.supervise import _pass_on
from app.runs.runs import RunStore
runs = RunStore(Path(sys.argv[1]))
queue = JobQueue(runs)
queue.start()
while not queue.jobs("running") or not runs.get("long").progress.step:
    time.sleep(0.1)
os._exit(9)  # as an app that is killed
"""


@pytest.mark.long
def test_the_queue_goes_on_after_the_app_was_killed_in_the_middle(
    queue: JobQueue, runs: RunStore, config: TrainConfig
) -> None:
    long = queue.add_training(config, "long", "me")
    queue.add_command("generate", QUICK, "me")
    app = [sys.executable, "-c", APP, str(runs.folder)]
    assert subprocess.run(app, cwd=ROOT, timeout=HANGS, check=False).returncode == 9
    queue.tick()
    assert states(queue) == [("long", "running"), ("generate", "queued")]
    assert 0 < (queue.fraction(queue.jobs("running")[0]) or 0) < 1
    queue.stop(long.id)
    tick_until(queue, lambda: not queue.jobs("queued", "running"))
    assert states(queue) == [("long", "stopped"), ("generate", "done")]
    assert queue.jobs()[0].exit_code == 3


@pytest.mark.long
def test_a_training_makes_way_for_a_picture_and_goes_on_after(
    queue: JobQueue, runs: RunStore, config: TrainConfig
) -> None:
    queue.add_training(config, "long", "me")
    tick_until(queue, lambda: queue.jobs("running") and runs.get("long").progress.step > 0)
    picture = queue.add_command("generate", QUICK, "you")
    queue.preempt(picture.id)
    tick_until(queue, lambda: [job.kind for job in queue.jobs("running")] == ["resume"])
    before = runs.get("long").progress.step
    assert ("long", "stopped") in states(queue)
    assert queue.jobs("done")[0].id == picture.id
    tick_until(queue, lambda: runs.get("long").progress.step > before)
    launch = runs.paths.last_launch("long")
    assert launch is not None
    kill_tree(read_json(launch.supervisor_file))  # as a computer that is switched off
    tick_until(queue, lambda: not queue.jobs("queued", "running"))
    (lost,) = queue.jobs("failed")
    assert (lost.kind, lost.exit_code) == ("resume", None)
    assert lost.error == "its process was killed, or the computer was switched off"
    assert queue.add_resume("long", "me").state == "queued"
    assert runs.get("long").state == "queued"


def test_of_two_apps_one_runs_the_queue_until_it_ends(queue: JobQueue, runs: RunStore) -> None:
    other = JobQueue(RunStore(runs.folder))
    assert other.tick()
    assert other.tick()
    job = queue.add_command("generate", QUICK, "me")
    assert not queue.tick()
    assert states(other) == [("generate", "queued")]
    other.close()
    queue.start()
    wait_until(lambda: not queue.jobs("queued", "running"))
    assert queue.output_of(job) == runs.folder / ".results" / f"job-{job.id}"
    assert states(queue) == [("generate", "done")]


def test_a_stop_that_cannot_be_passed_on_now_ends_no_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "touch", Mock(side_effect=PermissionError))  # Windows, while the file is being deleted
    _pass_on(tmp_path / "stop", Mock())
    monkeypatch.undo()
    _pass_on(tmp_path / "not there yet" / "stop", Mock())
    _pass_on(tmp_path / "stop", Mock())
    assert (tmp_path / "stop").exists()
