"""A comparison: finished runs of one base, prompts, seeds and strengths, as rows of pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from flatlora_diffusion.config import INCLUDED_BASES, SAMPLES, ConfigError
from flatlora_diffusion.storage.run_dir import RunDir

from ..context import AppContext
from ..process.file_cache import file_hash
from ..process.json_file import read_json
from ..runs.names import IMPORTED
from ..runs.runs import Run
from ..uploads.captions import TRIGGER, trigger_of_captions, with_trigger
from ..widgets.run_cards import method_name
from .picture_cache import Drawing, Picture, base_arguments, base_identity

MAX_PICTURES = 400
MIN_PAIRS = 8  # for a blind vote: of fewer, hardly any outcome says anything
_FLAT, _PLAIN = "flat-lora", "lora"
_METHOD_IN_ID = re.compile(rf"({_FLAT}|{_PLAIN})(?=(/seed-\d+)?$)")  # `compare` has a folder of seeds for each
_HELD_OUT = SAMPLES / "icons_3d" / "heldout" / "prompts.txt"


@dataclass(frozen=True)
class ComparedRun:
    """One column: a finished run, its LoRA file, and its base.

    Attributes:
        steps: optimizer steps up to the result.
        checkpoints: (steps, LoRA file) of each saved checkpoint.
    """

    id: str
    name: str
    method: str
    file: Path
    base: tuple[str, ...]
    resolution: int
    steps: int | None = None
    checkpoints: tuple[tuple[int, Path], ...] = ()

    @property
    def title(self) -> str:
        return method_name(self.method)

    @property
    def is_trained(self) -> bool:
        return self.method != IMPORTED

    def file_at(self, step: int | None) -> Path:
        """The LoRA after `step` steps; at the end for None."""
        return self.file if step is None else dict(self.checkpoints)[step]


@dataclass(frozen=True)
class GridRow:
    """One row: its label, and the pictures of the base and of each arm."""

    label: str
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Comparison:
    """Arms of one base with the same drawing settings.

    Attributes:
        moments: the training steps of the checkpoints to draw; None is the end.
    """

    arms: tuple[ComparedRun, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    steps: int
    guidance: float
    precision: str = "no"
    moments: tuple[int | None, ...] = (None,)

    def __post_init__(self) -> None:
        """Raises ConfigError for arms of different bases, and when there is nothing to draw or too much."""
        if not self.arms:
            raise ConfigError("no run is chosen; choose one or two")
        self._check_bases()
        if not self.prompts:
            raise ConfigError("there is no prompt; write what to draw, one picture a line")
        for prompt in self.prompts:
            if prompt.startswith("-"):  # the command that draws would take it for a flag
                raise ConfigError(f"the prompt {prompt!r} starts with a dash; write it without")
        if not self.strengths:
            raise ConfigError("there is no strength; write one or more, such as 0.5, 1")
        count = (1 + len(self.arms)) * len(self.prompts) * len(self.seeds) * len(self.strengths)
        count *= len(self.moments)
        if count > MAX_PICTURES:
            raise ConfigError(f"that is {count} pictures; choose fewer prompts or seeds, {MAX_PICTURES} at most")

    @property
    def drawing(self) -> Drawing:
        base = self.arms[0].base
        size = self._first.resolution
        return Drawing(base, size, self.steps, self.guidance, self.precision, base_identity(base))

    @property
    def files(self) -> dict[str, Path]:
        """The LoRA files by their hash."""
        files = [arm.file_at(moment) for moment in self.moments for arm in self.arms]
        return {file_hash(file): file for file in files}

    @property
    def titles(self) -> list[tuple[str, str]]:
        """(method, run name) of each column."""
        return [("Base", "without a LoRA"), *((arm.title, arm.name) for arm in self.arms)]

    def rows(self) -> list[GridRow]:
        """Prompt by prompt, seed by seed, strength by strength, moment by moment."""
        drawing = self.drawing
        hashes = {moment: [file_hash(arm.file_at(moment)) for arm in self.arms] for moment in self.moments}
        return [
            GridRow(
                self._label(prompt, seed, strength, moment),
                _row(drawing, hashes[moment], prompt, seed, strength),
            )
            for prompt in self.prompts
            for seed in self.seeds
            for strength in self.strengths
            for moment in self.moments
        ]

    def pictures(self) -> list[Picture]:
        """Each picture once."""
        return list(dict.fromkeys(picture for row in self.rows() for picture in row.pictures))

    @property
    def _first(self) -> ComparedRun:
        """The arm that sets the resolution: an imported LoRA takes that of the others."""
        return next((arm for arm in self.arms if arm.is_trained), self.arms[0])

    def _check_bases(self) -> None:
        first = self._first
        for arm in self.arms:
            if arm.base != first.base or (arm.is_trained and arm.resolution != first.resolution):
                raise ConfigError(
                    f"{arm.name} was trained on another base or at another size than {first.name}; "
                    "leave one of them out"
                )

    def _label(self, prompt: str, seed: int, strength: float, moment: int | None) -> str:
        parts = [prompt, f"seed {seed}"]
        if len(self.strengths) > 1:
            parts.append(f"strength {strength:g}")
        if len(self.moments) > 1:
            parts.append("at the end" if moment is None else f"after {moment} steps")
        return " · ".join(parts)


def common_moments(arms: Sequence[ComparedRun]) -> tuple[int | None, ...]:
    """The steps at which all `arms` have a checkpoint before their end, then None for the end.

    Raises ConfigError when they share no such checkpoint.
    """
    steps = [{step for step, _ in arm.checkpoints if arm.steps is None or step < arm.steps} for arm in arms]
    common = sorted(set.intersection(*steps)) if steps else []
    if not common:
        names = " and ".join(arm.name for arm in arms)
        raise ConfigError(
            f"{names}: no checkpoint of the same step was kept on the way; train with a smaller checkpointing_steps, "
            "or choose other rows"
        )
    return (*common, None)


def finished_arms(context: AppContext) -> list[ComparedRun]:
    """The runs that can be compared, newest first."""
    finished = [run for run in context.runs.all() if run.state == "finished"]
    arms = [(run, context.runs.cached(run, "arm", partial(_arm, context, run))) for run in finished]
    return [replace(arm, name=run.name) for run, arm in arms if arm is not None]


def newest_pair(context: AppContext, arms: Sequence[ComparedRun]) -> list[str]:
    """The ids of the newest fair pair, LoRA first; without a pair, the newest run; empty without runs."""
    known = {arm.id: arm for arm in arms}
    queued: dict[str, list[str]] = {}
    for job in context.queue.jobs():
        if job.pair is not None and job.run is not None:
            queued.setdefault(job.pair, []).append(job.run)
    partners = {run: pair for pair in queued.values() for run in pair}
    for arm in arms:
        pair = partners.get(arm.id) or _pair_by_name(arm.id)
        if len(pair) == 2 and all(run in known for run in pair):
            return sorted(pair, key=lambda run: known[run].method == _FLAT)
    return [arms[0].id] if arms else []


def default_seeds(prompts: str) -> str:
    """Enough seeds for MIN_PAIRS pairs of `prompts` in a blind vote."""
    count = max(1, len(read_prompts(prompts)))
    return ", ".join(map(str, range(-(-MIN_PAIRS // count))))


def default_prompts(context: AppContext, arms: Sequence[ComparedRun]) -> str:
    """Initial prompts: the held-out prompts of an included base, or the preview prompts of the runs.

    The held-out prompts get the trigger word of the first run's captions.
    """
    if not arms:
        return ""
    if INCLUDED_BASES.keys() & set(arms[0].base[1:2]) and _HELD_OUT.is_file():
        held_out = _HELD_OUT.read_text(encoding="utf-8").splitlines()[:MIN_PAIRS]
        folder = context.runs.settings(arms[0].id).get("instance_data_dir")
        return with_trigger("\n".join(held_out), TRIGGER, trigger_of_captions(Path(folder)) if folder else TRIGGER)
    prompts = [context.runs.settings(arm.id).get("validation_prompt") for arm in arms]
    return "\n".join(dict.fromkeys(prompt for prompt in prompts if prompt))


def read_prompts(text: str) -> tuple[str, ...]:
    """One prompt per line, without duplicates."""
    return tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def read_seeds(text: str) -> tuple[int, ...]:
    """Whole numbers with commas or spaces between. Raises ConfigError for anything else."""
    parts = re.split(r"[\s,;]+", text.strip())
    if not all(re.fullmatch(r"\d{1,15}", part) for part in parts):
        raise ConfigError(f"Seeds = {text!r} must be whole numbers, such as 0, 1, 2")
    return tuple(dict.fromkeys(map(int, parts)))


def read_strengths(text: str) -> tuple[float, ...]:
    """Numbers from 0 to 1.5 with commas or spaces between. Raises ConfigError for anything else."""
    parts = re.split(r"[\s,;]+", text.strip())
    if not all(re.fullmatch(r"\d?\.?\d{1,4}", part) and float(part) <= 1.5 for part in parts):
        raise ConfigError(f"LoRA strengths = {text!r} must be numbers from 0 to 1.5, such as 0.5, 1, 1.5")
    return tuple(dict.fromkeys(map(float, parts)))


def _arm(context: AppContext, run: Run) -> ComparedRun | None:
    """None for a run without a LoRA, or with an unknown resolution."""
    file = context.runs.exports(run.id).get("diffusers")
    resolution = read_json(RunDir(run.folder).config_file).get("resolution")
    if file is None or not resolution:
        return None
    return ComparedRun(
        id=run.id,
        name=run.name,
        method=run.method or _PLAIN,
        file=file,
        base=base_arguments(context.runs.settings(run.id)),
        resolution=resolution,
        steps=run.progress.end or run.progress.total,
        checkpoints=tuple(
            (int(name.rpartition("-")[2]), run.folder / name / file.name)
            for name in run.checkpoints
            if (run.folder / name / file.name).is_file()
        ),
    )


def _row(drawing: Drawing, hashes: list[str], prompt: str, seed: int, strength: float) -> tuple[Picture, ...]:
    base = Picture(drawing, prompt, seed)
    return (base, *(Picture(drawing, prompt, seed, one, strength) if strength else base for one in hashes))


def _pair_by_name(run_id: str) -> list[str]:
    found = _METHOD_IN_ID.search(run_id)
    return [run_id[: found.start()] + name + run_id[found.end() :] for name in (_PLAIN, _FLAT)] if found else []
