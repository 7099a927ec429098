"""What generalizes, by population: arms and averages of LoRAs on things that the base knows and does not know.

    python -m benchmarks.populations --work FOLDER                       # train and measure all that is missing
    python -m benchmarks.populations --work FOLDER --subjects lora sam   # only these
    python -m benchmarks.populations --work FOLDER --only-write          # the JSON of what is measured so far
    python -m benchmarks.populations --work FOLDER --base tiny_klein     # on a FLUX.2 klein: five subjects

Each subject is trained in `--groups` groups of three members with a seed each and measured on every list of
`population_icons`: the denoising loss of each icon under four (noise, timestep) draws, stratified over time, the same
for all subjects of a group and others for each group. A plain arm is the first member of each group; an average is
made of members of one group. Nothing is trained or measured twice, so the command goes on after a stop; processes that
train other arms may share a work folder.

Writes benchmarks/populations.json (populations_second_style.json, populations_klein.json), of which
`python -m benchmarks.populations_page` makes the tables of docs/generalization.md. Needs npm and the `recipe` extra
for the icons.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks import record
from benchmarks.population_icons import Style, second_style, style_3d
from benchmarks.population_subjects import STEPS, SUBJECTS, SUBJECTS_ON, Subject
from flatlora_diffusion.compare.arms import PlannedRun, parse_arm, plan_runs
from flatlora_diffusion.config import TINY, ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.evaluation.probe import Probe, draw_losses, fixed_probe, resample
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.registry import load_base
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.names import base_names
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.lora_tools.averaging import average_updates
from flatlora_diffusion.lora_tools.converting import read_lora_file, write_lora
from flatlora_diffusion.method.gradient import StepGradient
from flatlora_diffusion.method.rivals.sam import Sam
from flatlora_diffusion.method.rivals.sketch import Sketches
from flatlora_diffusion.storage.atomic_io import atomic_write, file_sha256
from flatlora_diffusion.training.trainer import train

SETTINGS = {
    "rank": 4,
    "max_train_steps": 300,
    "train_batch_size": 2,
    "learning_rate": 5e-4,
    "caption_dropout": 0.1,
    "random_flip": True,
    "cache_latents": True,
    "save_dtype": "fp32",
    "report_to": "none",
    "perturb_draw": "low_rank",
    "perturb_norm_every": 10,
}
POINTS = 6  # checkpoints of a run
DRAWS = 4  # (noise, timestep) pairs of an icon
MEMBERS = 3  # of a group
UNIT = 1e-5  # of the losses in the JSON
FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Row:
    """What one subject of one group loses at one strength, less the base: (icons, draws) by list."""

    subject: str
    group: int
    member: int
    strength: float
    losses: dict[str, Tensor]


class Study:
    """One base, one style: the trainings, the averages and the measurements below a work folder."""

    def __init__(self, style: Style, work: Path, base: str = TINY) -> None:
        self._style, self._work, self.name, self.base_name = style, work, work.name, base
        self.samples = {name: load_samples(folder).samples for name, folder in style.lists.items()}

    @cached_property
    def loaded(self) -> Base:
        """The base in fp32."""
        return load_base(ModelConfig(self.base_name), record.DEVICE, torch.float32)

    @cached_property
    def _first_probes(self) -> dict[str, Probe]:
        base = self.loaded
        return {name: fixed_probe(base, samples, base.resolution, 0, DRAWS) for name, samples in self.samples.items()}

    def probes(self, group: int) -> dict[str, Probe]:
        """The icons of every list under the draws of a group."""
        return {name: resample(probe, self.loaded, group) for name, probe in self._first_probes.items()}

    def rows(self, subject: Subject, group: int) -> Iterator[Row]:
        """Every row of a subject in a group, trained and measured where it is missing."""
        base = self._measured(None, group, 0.0)
        for member, file in self.files(subject, group):
            for strength in subject.strengths:
                losses = self._measured(file, group, strength)
                less = {name: values - base[name] for name, values in losses.items()}
                yield Row(subject.name, group, member, strength, less)

    def is_measured(self, subject: Subject, group: int) -> bool:
        """Whether `rows` has nothing left to do."""
        if not all(self._lora_of(run, step).is_file() for run, step in self._parts(subject, group)):
            return False
        files = [file for _, file in self.files(subject, group)]
        return all(self._cache(file, group, strength).is_file() for file in files for strength in subject.strengths)

    def files(self, subject: Subject, group: int) -> Iterator[tuple[int, Path]]:
        """The LoRA file of each row by its first member, that of a run or an average; trained where it is missing."""
        parts = self._parts(subject, group)
        for run, _ in parts:
            _train(run, subject)
        files = [self._lora_of(run, step) for run, step in parts]
        if not subject.is_average:
            yield from zip(subject.members, files, strict=True)
            return
        yield subject.members[0], self._average(files, subject.rank, subject.member_rank)

    def base(self, group: int) -> dict[str, Tensor]:
        """The base's own losses under the draws of a group."""
        return self._measured(None, group, 0.0)

    def _parts(self, subject: Subject, group: int) -> list[tuple[PlannedRun, int | None]]:
        runs = [self._planned(subject, group, member) for member in subject.members]
        return [(run, step) for run in runs for step in subject.checkpoints]

    def _planned(self, subject: Subject, group: int, member: int) -> PlannedRun:
        places = {
            "instance_data_dir": str(self._training(subject.images)),
            "output_dir": str(self._work / subject.folder),
        }
        settings: dict[str, Any] = settings_on(self.base_name) | places
        if subject.branch_at and member != subject.members[0]:
            trunk = self._planned(replace(subject, branch_at=0), group, subject.members[0])
            places["output_dir"] = str(self._work / "branches")
            begun = {"init_lora": str(self._lora_of(trunk, subject.branch_at))}
            settings |= places | begun | {"max_train_steps": STEPS - subject.branch_at}
        [run] = plan_runs(TrainConfig.from_dict(settings), [parse_arm(subject.arm)], [seed_of(group, member)], POINTS)
        return run

    def _training(self, images: int | None) -> Path:
        """The folder of the training images, or one with the first of them."""
        if images is None:
            return self._style.training
        folder = self._work / f"training-{images}"
        folder.mkdir(parents=True, exist_ok=True)
        for image in sorted(self._style.training.glob("*.png"))[:images]:
            for file in (image, image.with_suffix(".txt")):
                shutil.copy(file, folder)
        return folder

    def _lora_of(self, run: PlannedRun, step: int | None) -> Path:
        return run.lora if step is None else run.run.folder / f"checkpoint-{step}" / run.lora.name

    def _average(self, files: Sequence[Path], rank: int | None, member_rank: int | None) -> Path:
        cuts = [rank] if member_rank is None else [rank, member_rank]
        key = json.dumps([*(file_sha256(file) for file in files), *cuts])
        path = self._work / "averages" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"
        if not path.is_file():
            members = [read_lora_file(str(file), self.base_name).updates for file in files]
            if member_rank is not None:
                members = [average_updates([member], [1.0], member_rank).updates for member in members]
            average = average_updates(members, [1 / len(members)] * len(members), rank)
            write_lora(average.updates, base_names(self.base_name), path, "diffusers", "fp32", {})
        return path

    def _measured(self, file: Path | None, group: int, strength: float) -> dict[str, Tensor]:
        cache = self._cache(file, group, strength)
        if not cache.is_file():
            losses = self._measure(file, group, strength)
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache) as aside:
                save_file({name: values.float() for name, values in losses.items()}, aside)
        return {name: values.double() for name, values in load_file(cache).items()}

    def _measure(self, file: Path | None, group: int, strength: float) -> dict[str, Tensor]:
        objective, denoiser = self.loaded.objective(), self.loaded.denoiser
        if file is None:
            return {name: draw_losses(denoiser, objective, probe) for name, probe in self.probes(group).items()}
        pipeline, files = self.loaded.pipeline, [LoraFile(file)]
        with loras_loaded(pipeline, files), lora_scale(pipeline, files, strength, merge=True):
            return {name: draw_losses(denoiser, objective, probe) for name, probe in self.probes(group).items()}

    def _cache(self, file: Path | None, group: int, strength: float) -> Path:
        content = "base" if file is None else file_sha256(file)[:24]
        return self._work / "measured" / f"{content}-{group}-{strength:g}.safetensors"


def settings_on(base: str) -> dict[str, Any]:
    """The settings of all trainings on a base."""
    return {"pretrained_model_name_or_path": base, **SETTINGS}


def seed_of(group: int, member: int) -> int:
    """The training seed of a member."""
    return 5000 + 10 * group + member


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    logging.disable(logging.WARNING)  # of every file that is loaded the same
    torch.set_num_threads(options.threads)
    work = options.work.resolve()
    style = (second_style if options.second_style else style_3d)(work / "packages", work)
    of_base = "" if options.base == TINY else "-klein"
    study = Study(style, work / (("second-style" if options.second_style else "3d") + of_base), options.base)
    subjects = [SUBJECTS[name] for name in options.subjects or SUBJECTS_ON[options.base]]
    if not options.only_write:
        _measure_all(study, subjects, options.groups)
    name = ("populations_second_style" if options.second_style else "populations") + of_base.replace("-", "_")
    written = dict.fromkeys((*SUBJECTS_ON[options.base], *(subject.name for subject in subjects)))
    record.save(options.out / f"{name}.json", result(study, [SUBJECTS[name] for name in written], options.groups))


def _measure_all(study: Study, subjects: Sequence[Subject], groups: int) -> None:
    started = time.monotonic()
    left = [(subject, group) for group in range(groups) for subject in subjects]
    left = [(subject, group) for subject, group in left if not study.is_measured(subject, group)]
    for done, (subject, group) in enumerate(left, 1):
        rows = list(study.rows(subject, group))
        minutes = (time.monotonic() - started) / 60
        means = {name: round(float(values.mean()) / UNIT) for name, values in rows[-1].losses.items()}
        rest = minutes / done * (len(left) - done)
        print(f"{done}/{len(left)} {subject.name}, group {group}: {means}; {rest:.0f} minutes left", flush=True)


def result(study: Study, subjects: Sequence[Subject], groups: int) -> dict[str, Any]:
    """The losses measured so far, in 10⁻⁵, less the base's, by subject, group, strength, list, icon and draw."""
    rows = []
    for subject in subjects:
        for group in range(groups):
            if study.is_measured(subject, group):
                rows += [_saved(row) for row in study.rows(subject, group)]
    return {
        "settings": settings_on(study.base_name),
        "seeds": {str(group): [seed_of(group, member) for member in range(MEMBERS)] for group in range(groups)},
        "lists": {name: [sample.id for sample in samples] for name, samples in study.samples.items()},
        "subjects": {name: SUBJECTS[name].describe() for name in dict.fromkeys(row["subject"] for row in rows)},
        "base": {str(group): _rounded(study.base(group)) for group in range(groups)},
        "rows": rows,
    }


def _saved(row: Row) -> dict[str, Any]:
    return {
        "subject": row.subject,
        "group": row.group,
        "member": row.member,
        "strength": row.strength,
        "losses": _rounded(row.losses),
    }


def _rounded(losses: dict[str, Tensor]) -> dict[str, str]:
    """Whole multiples of 10⁻⁵: the draws of an icon joined by commas, icons by blanks, as indented JSON is large."""
    return {
        name: " ".join(",".join(str(round(value / UNIT)) for value in icon) for icon in values.tolist())
        for name, values in losses.items()
    }


def _train(run: PlannedRun, subject: Subject) -> None:
    """Train a run in this process, or what is left of it."""
    if not run.is_finished:
        with _ascending_in(subject):
            train(run.config.replace(resume_from_checkpoint="latest") if run.is_resumable else run.config)


@contextmanager
def _ascending_in(subject: Subject) -> Iterator[None]:
    """SAM's ascent in some of the steps, or by image; the other steps take the gradient at the weights."""
    ascend = Sam.compute

    def compute(self: Sam, step: int, micro_batches: Any) -> list[Tensor]:
        if subject.own_rise is not None:
            return _ascend_by_image(self, subject.own_rise, step, micro_batches)
        ascends = step >= subject.sam_from and step % subject.sam_every == 0
        return (ascend if ascends else StepGradient.compute)(self, step, micro_batches)

    if subject.sam_every > 1 or subject.sam_from > 0 or subject.own_rise is not None:
        Sam.compute = compute  # type: ignore[method-assign]
    try:
        yield
    finally:
        Sam.compute = ascend  # type: ignore[method-assign]


def _ascend_by_image(sam: Sam, rise: float, step: int, micro_batches: Iterable[Any]) -> list[Tensor]:
    """SAM with micro-batches of one image and an eps for each: eps = rise L g / ||g||^2, L + g eps = (1 + rise) L."""
    batches, losses = list(micro_batches), []
    for batch in batches:
        before = {weight: weight.grad for weight in sam._trainable}
        for weight in before:
            weight.grad = None
        with sam.recording(Sketches(sam._seed, step)) as sketches:
            losses.append(batch.backward(is_shared=False))
        for weight, grad in before.items():
            weight.grad = grad
        # The loop divides each loss, and so its gradient, by the number of micro-batches.
        gradient = sketches.norm() * len(batches)
        if 0 < float(gradient) < math.inf:
            sketches.scale(rise * losses[-1] / gradient**2 * len(batches))
            with sam.perturbed(sketches):
                batch.backward()
        else:
            batch.backward()
    return losses


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--work", type=Path, required=True, help="folder for icons, runs and measurements")
    found.add_argument(
        "--subjects", nargs="+", choices=list(SUBJECTS), metavar="SUBJECT", help="default: those of the base"
    )
    found.add_argument("--base", choices=list(SUBJECTS_ON), default=TINY)
    found.add_argument("--groups", type=int, default=5, help="groups of three seeds")
    found.add_argument("--second-style", action="store_true", help="train on icons with outlines instead of 3D icons")
    found.add_argument("--only-write", action="store_true", help="write the JSON of what is measured, train nothing")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON")
    return found


if __name__ == "__main__":
    main()
