"""The phases of `compare`: their order, what is told of them, and a stop between them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from torch import nn

from flatlora_diffusion.commands.command_line import main
from flatlora_diffusion.compare import evaluator, experiment, inputs, losses, pictures
from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.progress import WorkItem, run_items
from flatlora_diffusion.training.trainer import train


class Story:
    """What happened in a comparison, in order, and how often the UNet was asked for what no bar had counted."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.happened: list[str] = []
        self.counted: list[tuple[int, int]] = []
        self.uncounted = 0
        self.is_counting = False
        self.lines: list[str] = []

    def tell(self, what: str) -> None:
        """Note what happens, once in a row, with the files that are there."""
        there = [name for name in ("compare.png", "compare.html") if (self.out / name).is_file()]
        line = " ".join((what, *there))
        if self.happened[-1:] != [line]:
            self.happened.append(line)


class Lines(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Stop(KeyboardInterrupt):
    """A stop in the middle of a test."""


def watch(story: Story, patch: pytest.MonkeyPatch, is_stopped: bool) -> None:
    """Have `story` tell of trainings, measurements and drawings; the first null to be trained may stop it all."""

    def trained(planned: PlannedRun, on_wait: None) -> None:
        if planned.is_finished:
            story.tell(f"{planned.arm.key} is there")
            return
        story.tell(f"train {planned.arm.key}")
        if is_stopped and planned.arm.role == "null":
            raise Stop
        train(planned.config)

    def counted(unet: nn.Module, pieces: Sequence[WorkItem]) -> None:
        seen = 0

        def count(module: nn.Module, arguments: Any, output: Any) -> None:
            nonlocal seen
            seen += len(output[0])
            story.uncounted += 0 if story.is_counting else len(output[0])

        expected = sum(piece.passes for piece in pieces)
        unet.register_forward_hook(count)
        story.is_counting = True
        run_items(unet, pieces)
        story.is_counting = False
        story.counted.append((expected, seen))

    def watched(module: Any, name: str, what: str) -> None:
        real = getattr(module, name)

        def told(*arguments: Any, **more: Any) -> Any:
            story.tell(what)
            return real(*arguments, **more)

        patch.setattr(module, name, told)

    watched(losses, "probe_losses", "measure")
    watched(losses, "loss_increases", "measure")
    watched(pictures, "generate_images", "draw")
    patch.setattr(evaluator, "STRENGTHS", (0.5, 1.0))
    patch.setattr(evaluator, "INCREASE_DRAWS", 1)
    patch.setattr(inputs, "PictureGenerator", partial(pictures.PictureGenerator, steps=2))
    patch.setattr(experiment, "train_run", trained)
    patch.setattr(experiment, "run_items", counted)


def told(out: Path, base: Path, images: Path, is_stopped: bool = False) -> Story:
    """A comparison of one step, as the command line makes it."""
    heldout = out.parent / "heldout"
    if not heldout.exists():
        heldout.mkdir()
        for file in images.glob("icon-*.png"):
            ImageOps.mirror(Image.open(file)).save(heldout / file.name)
            (heldout / f"{file.stem}.txt").write_text("an icon", encoding="utf-8")
    arguments = [
        *("--pretrained_model_name_or_path", str(base)),
        *("--instance_data_dir", str(images), "--heldout_dir", str(heldout)),
        *("--output_dir", str(out), "--max_train_steps", "1", "--num_checkpoints", "1", "--train_batch_size", "1"),
        *("--num_prompts", "1", "--pictures_per_prompt", "1", "--report_to", "none"),
        *("--sigma_schedule", "constant"),
    ]
    story = Story(out)
    logger, handler = logging.getLogger("flatlora_diffusion.compare"), Lines(story.lines)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        watch(story, patch, is_stopped)
        try:
            assert main(["compare", *arguments]) == (130 if is_stopped else 0)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
    return story


@pytest.fixture(scope="module")
def images(icons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The icons, with a licence and a broken picture among them."""
    folder = tmp_path_factory.mktemp("mine")
    for file in icons.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "LICENSE").write_text("Free for all", encoding="utf-8")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def stopped(base: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A comparison that was stopped before the first null."""
    return told(tmp_path_factory.mktemp("phases") / "out", base, images, is_stopped=True)


@pytest.fixture(scope="module")
def report_of_arms(stopped: Story) -> dict[str, Any]:
    """What the stopped comparison left."""
    found: dict[str, Any] = json.loads((stopped.out / "compare.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def resumed(stopped: Story, report_of_arms: dict[str, Any], base: Path, images: Path) -> Story:
    """The same command given again."""
    return told(stopped.out, base, images)


def test_the_arms_are_trained_then_drawn_then_measured_then_come_the_nulls(stopped: Story) -> None:
    assert stopped.happened[:3] == ["train lora", "train flat-lora", "draw"]
    measured = [line for line in stopped.happened if line.startswith("measure")]
    assert measured
    assert set(measured) == {"measure compare.png"}, "the grid is on disk before the first measurement"
    assert stopped.happened[-1] == "train sigma-0 compare.png compare.html", "the report is there before the nulls"


def test_the_estimate_is_updated_from_measured_steps(stopped: Story, resumed: Story) -> None:
    told = [line for story in (stopped, resumed) for line in story.lines if " trainings done; " in line]
    assert [line[:6] for line in told] == [f"{done} of 5" for done in (1, 2, 3, 4)]
    assert "draw a picture" in stopped.lines[7]
    assert resumed.lines[5] == "5 trainings in all; 2 are done"
    assert "the steps of its earlier runs" in resumed.lines[7]


def test_a_report_without_controls_has_everything_else(report_of_arms: dict[str, Any]) -> None:
    assert [arm["key"] for arm in report_of_arms["arms"]] == ["lora", "flat-lora"]
    assert report_of_arms["nulls"] == []
    assert report_of_arms["verdict"].startswith("One seed and ")
    assert all(report_of_arms[part] for part in ("paired", "trajectories", "strengths", "advice", "pictures", "proof"))


def test_a_stopped_comparison_resumes_and_repeats_nothing(stopped: Story, resumed: Story) -> None:
    trained = [line.split()[1] for line in resumed.happened if line.startswith("train ")]
    assert trained == ["sigma-0", "other-draws", "second-eps"]
    drawing, arms, nulls = resumed.counted
    assert (drawing, arms) == ((0, 0), (0, 0))
    assert nulls[0] > 0
    assert {"lora is there compare.png compare.html", "flat-lora is there compare.png compare.html"} <= set(
        resumed.happened
    )


def test_the_full_report_only_adds_the_controls(report_of_arms: dict[str, Any], resumed: Story) -> None:
    found = json.loads((resumed.out / "compare.json").read_text(encoding="utf-8"))
    assert {key for key in found if found[key] != report_of_arms[key]} == {"arms", "values", "proof", "nulls"}
    assert len(found["nulls"]) == 4
    assert found["values"]["lora"] == report_of_arms["values"]["lora"]
    assert set(found["values"]) == {"lora", "flat-lora", "sigma-0", "other-draws", "second-eps"}


def test_the_progress_bars_count_all_work(stopped: Story, resumed: Story) -> None:
    for story in (stopped, resumed):
        assert all(expected == seen for expected, seen in story.counted), story.counted
        assert story.uncounted == 0
