"""Trains the arms of `paper_variants` and measures each run once; all is kept in a folder, so a stop loses nothing."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.paper_variants_figures import Row, chosen_point
from benchmarks.paper_variants_plan import Group
from benchmarks.train_step import ready_step
from benchmarks.turns import Step, compare
from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan
from flatlora_diffusion.compare.evaluator import names_of
from flatlora_diffusion.compare.losses import UNGROUPED, ImageSet, LossEvaluator
from flatlora_diffusion.compare.timing import PASSES
from flatlora_diffusion.compare.workers.at_once import train_at_once
from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.evaluation.judge import Judge, load_judge
from flatlora_diffusion.evaluation.metrics import judge_metrics
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.ground.seeds import derive_seed
from flatlora_diffusion.ground.whole_files import file_sha256, write_json, writing_whole
from flatlora_diffusion.lora_files.attached import loaded
from flatlora_diffusion.lora_files.place import LoraFile
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.sdxl.sampling import GUIDANCE, STEPS, generate_images
from flatlora_diffusion.training.trainer import train

POINTS = 6  # checkpoints of a run
MOST = {"search": 80, "report": 160, "flat": 40, "pictures": 8}  # icons of each list
DRAWS = {"train": 2, "search": 1, "report": 1, "flat": 1}  # (noise, timestep) pairs of each
RISE, RISE_DRAWS = 0.1, 2
COST_SECONDS = 8.0  # in which two arms take turns
MANY = 0.6  # what a pass costs where many samples go through the UNet together, in passes of one alone
AFTER = ("report", "flat")
_ALONG = ("train", "search")
_ALL = (*_ALONG, *AFTER)  # in one go, as a LoRA has to be loaded for each


@dataclass(frozen=True)
class Icons:
    """What is trained on, the lists that are measured, and the folder whose icons are drawn and named by the judge."""

    training: Path
    lists: Mapping[str, Path]
    named: Path


class Bench:
    """One base, one set of training images: the runs on them and their figures."""

    def __init__(self, sdxl: Sdxl, config: TrainConfig, icons: Icons, kept: Path, most: Mapping[str, int]) -> None:
        """`config` is what all arms share; its output_dir holds the runs, `kept` what is measured."""
        self.sdxl, self._config, self._icons, self._kept, self._most = sdxl, config, icons, kept, most
        self._measures: dict[tuple[str, ...], LossEvaluator] = {
            names: self.evaluator(names, sdxl) for names in (_ALONG, AFTER, _ALL)
        }
        self._pictures = Pictures(sdxl, _some(icons.named, most["pictures"]), icons.named, kept)

    @property
    def reported(self) -> LossEvaluator:
        """The evaluator of the lists `AFTER`."""
        return self._measures[AFTER]

    def evaluator(self, names: Sequence[str], sdxl: Sdxl) -> LossEvaluator:
        """That of some lists, on this base or on another form of it."""
        sets = {}
        for name in names:
            samples = _some(self._icons.lists[name], self._most[name]) if name != "train" else self._training()
            sets[name] = ImageSet(samples, [UNGROUPED] * len(samples), DRAWS[name])
        return LossEvaluator(sdxl, Objective(sdxl.scheduler), sets, sdxl.resolution, self._kept)

    def planned(self, group: Group) -> list[PlannedRun]:
        """The runs of a group, seed by seed."""
        return plan(self._config, [parse_arm(key) for key in group.arms], group.seeds, POINTS)

    def rows(self, group: Group, workers: int | None, cluster: str | None = None) -> list[Row]:
        """All runs of a group, trained and measured where they are not yet."""
        runs = self.planned(group)
        if workers or cluster:
            train_at_once(runs, workers, cluster)
        rows = []
        for number, planned in enumerate(runs, 1):
            trained(planned)
            rows.append(
                self._walked(planned, {planned.steps: planned.lora}, _ALONG) if group.trial else self.measured(planned)
            )
            print(f"{number}/{len(runs)} {planned.label}: search {rows[-1]['points'][-1]['search']:.5f}", flush=True)
        return rows

    def base(self) -> dict[str, float]:
        """The base's own figures."""
        losses = self._measures[_ALL].losses(None)
        return {**{name: found[UNGROUPED] for name, found in losses.items()}, **self._pictures(None)}

    def measured(self, planned: PlannedRun) -> Row:
        """Everything about one run; the reported icons choose nothing."""
        row = self._walked(planned, planned.files, _ALL)
        at_chosen, at_end = chosen_point(row["points"]), row["points"][-1]
        rises = self._measures[_ALONG].rises(planned.lora, "train", RISE, RISE_DRAWS)
        return {
            **row,
            **{name: at_end[name] for name in ("train", *AFTER)},
            "chosen": at_chosen["report"],
            "chosen_flat": at_chosen["flat"],
            "chosen_step": at_chosen["step"],
            "rise": statistics.fmean(rises),
            **self._pictures(planned.lora),
        }

    def strip(self, lora: Path | None) -> list[Image.Image]:
        """The pictures of a file that was measured, or of the base."""
        return self._pictures.strip(lora)

    def left(self, planned: PlannedRun, is_trial: bool) -> float:
        """How many samples the UNet has still to see, a step of training counted as so many as it costs."""
        along, training = self._measures[_ALONG], self.training_left(planned)
        if is_trial:
            return training + MANY * along.losses_left(planned.lora)
        passes = sum(self._measures[_ALL].losses_left(file) for file in planned.files.values())
        passes += along.rises_left(planned.lora, "train", RISE, RISE_DRAWS)
        return training + MANY * (passes + self._pictures.left(planned.lora))

    def training_left(self, planned: PlannedRun) -> float:
        """The same of the training alone."""
        return planned.steps_left * planned.config.optim.train_batch_size * PASSES[planned.arm.method]

    def cost(self, planned: PlannedRun, reference: PlannedRun) -> dict[str, Any]:
        """Quartiles of a step's seconds over the reference's, taken in turns, and the most bytes that it holds."""
        with tempfile.TemporaryDirectory() as folder:
            steps = {"lora": self._step(reference, folder), "arm": self._step(planned, folder)}
            found = compare(steps, COST_SECONDS)
        return {"ratio": found["arm / lora"], "peak_bytes": found["peak_bytes"]["arm"]}

    def _step(self, planned: PlannedRun, folder: str) -> Step:
        config = planned.config.replace(output_dir=folder, max_train_steps=10_000)  # more than are taken
        return ready_step(config, self._training())

    def _training(self) -> Sequence[Sample]:
        return load_samples(self._icons.training).samples

    def _walked(self, planned: PlannedRun, files: Mapping[int, Path], names: tuple[str, ...]) -> Row:
        """What is known of a run on these lists, at these steps."""
        steps = planned.run.steps()
        seconds = statistics.median(event["seconds"] for event in steps)
        points = [
            {"step": step, "seconds": round(seconds * step, 2), **self._loss(names, file)}
            for step, file in files.items()
        ]
        return {**identity(planned), "points": points}

    def _loss(self, names: tuple[str, ...], lora: Path) -> dict[str, float]:
        return {name: found[UNGROUPED] for name, found in self._measures[names].losses(lora).items()}


class Pictures:
    """Draws some icons with a LoRA, asks the judge what they show, and keeps a strip of them and its answers."""

    def __init__(self, sdxl: Sdxl, samples: Sequence[Sample], folder: Path, kept: Path) -> None:
        names = names_of(folder, load_samples(folder).samples)
        self._names = {sample.caption: names[sample.caption] for sample in samples if sample.caption in names}
        self._candidates = sorted(set(names.values()))
        self._sdxl, self._kept = sdxl, kept / "pictures"
        self._judge: Judge | None = None
        self._base = base_fingerprint(sdxl.unet)

    def __call__(self, lora: Path | None) -> dict[str, float]:
        """`name_found` and `style_probability`, and nothing where no icon has a name."""
        file = self._file(lora)
        if not self._names:
            return {}
        if not file.is_file():
            with loaded(self._sdxl.pipeline, [] if lora is None else [LoraFile(lora)]):
                prompts, size = list(self._names), self._sdxl.resolution
                images = generate_images(self._sdxl, prompts, [0] * len(prompts), size, batch_size=len(prompts))
            self._judge = self._judge or load_judge(SAMPLES / "tiny_sdxl" / "judge")
            pictures = {(prompt, 0): image for prompt, image in zip(prompts, images, strict=True)}
            found = judge_metrics(self._judge, pictures, self._names, self._candidates)
            self._kept.mkdir(parents=True, exist_ok=True)
            with writing_whole(file.with_suffix(".png")) as aside:
                _beside_each_other(images).save(aside, format="PNG")
            write_json(file, found)
        kept: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))
        return kept

    def strip(self, lora: Path | None) -> list[Image.Image]:
        with Image.open(self._file(lora).with_suffix(".png")) as image:
            side, whole = image.height, image.convert("RGB")
        return [whole.crop((left, 0, left + side, side)) for left in range(0, whole.width, side)]

    def left(self, lora: Path) -> int:
        """How many samples the UNet has to see."""
        is_there = lora.is_file() and self._file(lora).is_file()
        return 0 if is_there else len(self._names) * STEPS * (2 if GUIDANCE > 1 else 1)

    @property
    def names(self) -> list[str]:
        return list(self._names.values())

    def _file(self, lora: Path | None) -> Path:
        content = "base" if lora is None else file_sha256(lora)
        key = json.dumps([self._base, content, list(self._names)])
        return self._kept / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def trained(planned: PlannedRun) -> None:
    """Train a run in this process, or what is left of it."""
    if not planned.is_finished:
        train(planned.config.replace(resume_from_checkpoint="latest") if planned.is_begun else planned.config)


def identity(planned: PlannedRun) -> Row:
    """Arm, seed, and the hash of what was drawn in all steps of a run that has ended."""
    draws = json.dumps([event["draws"] for event in planned.run.steps()])
    hashed = hashlib.sha256(draws.encode()).hexdigest()[:16]
    return {"arm": planned.arm.key, "seed": planned.seed, "draws": hashed}


def few_images(training: Path, count: int, folder: Path) -> Path:
    """A folder with so many of the training images, always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for sample in _some(training, count):
        for file in training.glob(f"{Path(sample.id).stem}.*"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def _some(folder: Path, count: int) -> list[Sample]:
    """So many of a folder's images, drawn by key."""
    samples = load_samples(folder).samples
    drawn = sorted(samples, key=lambda sample: derive_seed(0, "paper_variants", sample.id))[:count]
    return [sample for sample in samples if sample in drawn]


def _beside_each_other(images: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    for place, image in enumerate(images):
        whole.paste(image, (place * image.width, 0))
    return whole
