"""The bookkeeping of the soak: which kills it plans, what it counts as lost, touched and wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.short_run import STEPS, Forked, Scene
from benchmarks.soak import Case, Order, figures, plan, table
from benchmarks.soak_disk import IS_ROOT, break_disk, means, mend_disk, own_disk
from benchmarks.soak_judge import (
    CACHING,
    CARD,
    CHECKPOINT,
    FULL,
    KINDS,
    LAST,
    LOAD,
    LORA as FINAL_LORA,
    PHASES,
    PREVIEW,
    READ_ONLY,
    SIGINT,
    SIGKILL,
    SIGTERM,
    STEP,
    End,
    Kill,
    Left,
    Progress,
    Timeline,
    lost_steps,
    phase_of,
    same_tensors,
    wrong_end,
    wrong_pair,
)
from flatlora_diffusion.storage.run_dir import LORA_FILE

STOPPED = "error: stopped after step 3 by SIGTERM; --resume_from_checkpoint latest goes on"
FULL_DISK = "error: the run folder cannot be written: the disk is full; the last good checkpoint is checkpoint-2"
IN_USE = "error: output_dir='run' is in use by another run"
TRACEBACK = "Traceback (most recent call last):\nKeyboardInterrupt"


def kill(kind: str, phase: str, steps: int = 3, checkpoints: tuple[int, ...] = (2,), has_lora: bool = False) -> Kill:
    return Kill(kind, phase, Progress(steps, Left(list(checkpoints), has_lora)), STEPS)


def test_fifty_kills_are_of_every_kind_in_every_phase_and_of_a_fifth_real_starts() -> None:
    orders = plan(50, seed=0)
    kinds = [kind for kind in KINDS if kind not in (FULL, READ_ONLY) or kind in means()]
    assert [order.number for order in orders] == list(range(50))
    assert {order.kind for order in orders} == set(kinds)
    assert {order.phase for order in orders} == set(PHASES)
    cells = [(order.kind, order.phase) for order in orders]
    assert len(set(cells)) == min(50, len(kinds) * len(PHASES))
    assert all(order.is_real for order in orders if order.phase == LOAD)
    assert 8 <= sum(order.is_real for order in orders) <= 12
    assert orders == plan(50, seed=0)
    assert orders[:5] == plan(5, seed=0)
    assert orders != plan(50, seed=1)


@pytest.mark.parametrize(
    ("markers", "phases"),
    [
        (["step-6", "preview-7", "lora", "proof", "finished-7", "exit"], [STEP, LAST, FINAL_LORA, CARD, CARD, CARD]),
        (["step-6", "lora", "preview-7", "proof", "finished-7", "exit"], [STEP, FINAL_LORA, LAST, CARD, CARD, CARD]),
    ],
)
def test_a_phase_is_what_the_unbroken_run_makes_next_in_whatever_order(markers: list[str], phases: list[str]) -> None:
    timeline = Timeline({marker: float(second) for second, marker in enumerate(markers, start=1)}, STEPS)
    assert [timeline.phase(set(markers[:count])) for count in range(len(markers))] == phases
    assert timeline.moment(phases[1], 0.0) == ("step-6", 0.0)
    assert timeline.moment(CARD, 0.5) == ("proof", 0.5)  # 1.5 of its 3 seconds


def test_steps_previews_and_checkpoints_tell_their_phase() -> None:
    found = [phase_of(marker, STEPS) for marker in ("cache", "step-0", "preview-3", "checkpoint-2")]
    assert found == [LOAD, STEP, PREVIEW, CHECKPOINT]


@pytest.mark.parametrize(
    ("done", "code", "text"),
    [
        (kill(SIGTERM, STEP), 3, STOPPED),
        (kill(SIGINT, LOAD, 0, ()), 130, "error: interrupted"),
        (kill(SIGTERM, LOAD, 0, ()), -15, ""),
        (kill(SIGKILL, STEP), -9, "half a li"),
        (kill(FULL, CHECKPOINT), 1, FULL_DISK),
        (
            kill(FULL, LOAD, 0, ()),
            2,
            "error: output_dir='run' is on a disk with 0.0 MiB free, but about 2 MiB are needed",
        ),
        (kill(FULL, CARD, STEPS, (4, 6), has_lora=True), 0, "uploaded"),
        (kill(SIGINT, STEP, STEPS - 1), 0, "saved"),
        (kill(SIGTERM, CHECKPOINT, STEPS - 1), 143, "error: stopped by SIGTERM after the LoRA was saved in run"),
    ],
)
def test_a_promised_end_is_right(done: Kill, code: int, text: str) -> None:
    left = Left(done.at.left.checkpoints, has_lora=code == 0)
    assert wrong_end(done, End(code, f"3 images\n{text}\n"), left) is None


@pytest.mark.parametrize(
    ("done", "code", "text", "complaint"),
    [
        (kill(SIGTERM, STEP), None, "", "hung"),
        (kill(SIGINT, LOAD, 0, ()), 3, TRACEBACK, "a traceback, exit 3: KeyboardInterrupt"),
        (kill(SIGTERM, STEP), -15, "", "exit -15"),
        (kill(SIGTERM, CACHING, 0, ()), -15, "", "exit -15"),
        (kill(SIGINT, STEP), 2, STOPPED, "exit 2"),
        (kill(SIGTERM, CHECKPOINT), 143, "error: stopped by SIGTERM", "exit 143"),
        (kill(SIGINT, STEP), 0, "saved", "exit 0, as if nothing had been"),
        (kill(SIGINT, LAST, STEPS), 3, "stopped", "not one sentence"),
        (kill(SIGTERM, STEP), 3, f"{STOPPED}\n{STOPPED}", "not one sentence"),
        (kill(SIGTERM, STEP), 3, "error: no", "does not say that it was stopped"),
        (kill(FULL, CHECKPOINT), 1, "error: no space", "does not say what cannot be written"),
        (kill(FULL, STEP, 5, (2, 4)), 1, FULL_DISK, "does not say that checkpoint-4 is kept"),
        (kill(READ_ONLY, STEP), 2, FULL_DISK, "exit 2"),
    ],
)
def test_any_other_end_is_wrong(done: Kill, code: int | None, text: str, complaint: str) -> None:
    left = Left(done.at.left.checkpoints, has_lora=True)
    assert str(wrong_end(done, End(code, text), left)).startswith(complaint)


def test_of_two_runs_in_one_folder_the_second_is_refused_and_in_a_race_one_of_them() -> None:
    done, refused = End(0, "saved"), End(2, IN_USE)
    assert wrong_pair(done, refused, is_race=False) is None
    assert wrong_pair(refused, done, is_race=True) is None
    assert wrong_pair(refused, done, is_race=False) == f"exit 2, not 0, of the run itself: {IN_USE}"
    assert wrong_pair(done, done, is_race=True) == "exit 0, not 2, of the other: saved"
    assert wrong_pair(done, End(2, "error: no run to resume"), is_race=False) == (
        "does not say whose folder it is: error: no run to resume"
    )
    assert str(wrong_pair(done, End(2, TRACEBACK), is_race=False)).startswith("a traceback of the other")


def test_a_signal_may_cost_no_step_and_a_kill_only_those_since_the_checkpoint() -> None:
    at = {"steps": 5, "checkpoints": (2, 4)}
    assert lost_steps(kill(SIGTERM, STEP, **at), Left([2, 4, 5], has_lora=False)) == 0  # type: ignore[arg-type]
    assert lost_steps(kill(SIGTERM, STEP, **at), Left([2, 4], has_lora=False)) == 1  # type: ignore[arg-type]
    assert lost_steps(kill(SIGKILL, STEP, **at), Left([2, 4], has_lora=False)) == 0  # type: ignore[arg-type]
    assert lost_steps(kill(SIGKILL, STEP, **at), Left([2], has_lora=False)) == 2  # type: ignore[arg-type]
    finished = kill(FULL, LAST, STEPS, (4, 6), has_lora=True)
    assert lost_steps(finished, Left([4, 6], has_lora=True)) == 0
    assert lost_steps(finished, Left([4, 6], has_lora=False)) == 1


def test_files_of_the_user_are_touched_when_they_move_change_or_go(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene")
    scene.furnish()
    (scene.run / "checkpoint-4").mkdir()
    assert scene.touched() == []
    assert scene.checkpoints() == [4]  # not checkpoint-2-best
    (scene.run / "notes.txt").write_text("mine\n")
    (scene.run / "checkpoint-2-best").rename(scene.run / "earlier-1")
    (scene.icons / "crown.txt").unlink()
    assert scene.touched() == [
        "disk/run/checkpoint-2-best/pytorch_lora_weights.safetensors",
        "disk/run/notes.txt",
        "icons/crown.txt",
    ]


@pytest.mark.skipif(not IS_ROOT, reason="disks can be mounted by root on Linux only")
@pytest.mark.parametrize("kind", [FULL, READ_ONLY])
def test_a_disk_breaks_with_a_file_open_on_it_and_is_mended_again(tmp_path: Path, kind: str) -> None:
    disk, run, process = tmp_path / "disk", tmp_path / "disk" / "run", Forked(0)
    disk.mkdir()
    with own_disk(disk):
        run.mkdir()
        with (run / ".lock").open("wb"):
            break_disk(kind, disk, run, process)
            with pytest.raises(OSError, match=r"space|Read-only"):
                (run / "file").write_bytes(bytes(2**13))
        mend_disk(kind, disk, run)
        (run / "file").write_bytes(bytes(2**13))
        break_disk(kind, disk, run, process)
    assert list(disk.iterdir()) == []


def test_progress_is_read_from_the_files_of_a_run_and_a_torn_line_is_no_news(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "scene")
    scene.furnish()
    assert scene.markers() == set()
    scene.cache.mkdir()
    (scene.cache / "latent-1.safetensors").touch()
    events = '{"event": "start"}\n{"event": "step", "step": 0}\n{"event": "step", "st'
    (scene.run / "events.jsonl").write_text(events)
    (scene.run / LORA_FILE).touch()
    assert scene.markers() == {"cache", "start", "step-0", "lora"}
    assert scene.progress() == Progress(1, Left([], has_lora=True))


def test_tensors_are_the_same_only_bit_for_bit(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({"a": torch.ones(2)}, one)
    assert not same_tensors(one, two)
    for other, is_same in ((torch.ones(2), True), (torch.ones(2) + 1e-6, False), (torch.ones(2).double(), False)):
        save_file({"a": other}, two)
        assert same_tensors(one, two) is is_same
    two.write_bytes(two.read_bytes()[:-1])
    assert not same_tensors(one, two)


def test_the_table_counts_kills_and_failures_by_kind_and_phase() -> None:
    def case(kind: str, phase: str, lost: int = 0) -> Case:
        order = Order(0, kind, phase, 0.0, is_real=False, resumes=False)
        return Case(order, phase, lost=["a step"] * lost)

    cases = [case(SIGTERM, STEP, lost=2), case(SIGTERM, STEP), case(SIGINT, LOAD)]
    found = figures(cases)
    assert (found["kills"], found["lost"], found["touched"], found["wrong"]) == (3, 1, 0, 0)
    text = table(cases, {**found, "means": {}, "starts": "0 of 3", "seconds": 1})
    assert "| SIGINT | load | 1 | 0 | 0 | 0 |\n| SIGTERM | steps | 2 | 1 | 0 | 0 |\n| all |  | 3 | 1 | 0 | 0 |" in text
    assert "full disk: left out, this system has no means for it" in text
