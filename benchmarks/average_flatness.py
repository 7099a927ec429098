"""Does an average of LoRAs lie between minima, and how flat is it there? benchmarks/average_flatness.json

    python -m benchmarks.average_flatness --work FOLDER       # train and measure all that is missing
    python -m benchmarks.average_flatness_page                # the section of docs/generalization.md and its picture

The members of a group and their average are those of `benchmarks.populations` and share its work folder. Measured at
the base, at each member, at the average, at the average cut to the members' rank and at the first member weakened
until its update is as long as the average's: the loss, its expected rise under Eq. 7's noise, its worst-case rise and
the Hessian's trace, on the training images and on the first held-out icons of `known 200`; and the loss along the
segments between members, average and base, and over the plane through the members of the first group. Noise, signs
and timesteps are the same for all of a group and others for each group. Nothing is measured twice, so the command goes
on after a stop; about 17 minutes of a core with five groups, and one more for each training.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.population_icons import Style, style_3d
from benchmarks.population_subjects import SUBJECTS
from benchmarks.populations import MEMBERS, SETTINGS, UNIT, Study, seed_of
from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.evaluation.probe import Probe, draw_losses, fixed_probe
from flatlora_diffusion.flatness.curvature import trace
from flatlora_diffusion.flatness.functional import Weights, loss_at, noise, scales, shifted
from flatlora_diffusion.flatness.landscape import worst_rises
from flatlora_diffusion.flatness.loss_surface import axis
from flatlora_diffusion.flatness.merged_weights import (
    Deltas,
    base_weights,
    lora_deltas,
    merged,
    probe_loss_at,
    twice_differentiable,
)
from flatlora_diffusion.lora_files.loading import loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.sampling import evaluating
from flatlora_diffusion.storage.atomic_io import file_sha256, write_json

CONFIG = FlatnessConfig(
    sigmas=(0.1, 0.4),
    rise_draws=2,
    radii=(0.003, 0.01),
    trace_probes=2,
    probe_draws=1,
    surface_points=9,
    extent=1.6,  # of the plane, in distances of the farthest member from the average
)
HELDOUT_ICONS = 24
FILE = Path(__file__).with_suffix(".json")
TRAINING, HELDOUT = "training", "known 200"
BASE, AVERAGE, CUT, WEAKENED = "base", "average", "average, rank 4", "member 1, weakened"
MEMBER_NAMES = [f"member {number}" for number in range(1, MEMBERS + 1)]
CURVED = (BASE, *MEMBER_NAMES, AVERAGE)
POINTS = (*CURVED, WEAKENED, CUT)
SEGMENTS = (
    *((MEMBER_NAMES[one], MEMBER_NAMES[(one + 1) % MEMBERS]) for one in range(MEMBERS)),
    *((name, AVERAGE) for name in MEMBER_NAMES),
    (AVERAGE, BASE),
)
BETWEEN = (0.25, 0.5, 0.75)

IconLosses = Callable[[Weights], Tensor]
"""The loss of each icon and draw at any weights, (icons, draws) fp64."""
Figures = dict[str, str]
"""By measure, the values in 10⁻⁵ joined by blanks: one an icon, or one alone."""


@dataclass(frozen=True)
class Plane:
    """A plane in weight space: a point is origin + a across + b along. `members` are the members' (a, b)."""

    origin: Weights
    across: Weights
    along: Weights
    members: list[list[float]]

    def at(self, a: float, b: float) -> Weights:
        return shifted(shifted(self.origin, self.across, a), self.along, b)


class Group:
    """The LoRAs of one group of seeds as weights W', and the losses of its draws; made when they are first used."""

    def __init__(self, study: Study, samples: dict[str, list[Sample]], group: int, config: FlatnessConfig) -> None:
        self.number, self._study, self._samples, self._config = group, study, samples, config
        self.files = [
            file
            for name in ("lora", "average of 3", "average of 3, rank 4")
            for _, file in study.files(SUBJECTS[name], group)
        ]

    @cached_property
    def weights(self) -> dict[str, Weights]:
        """W' by point; of the base, W."""
        *members, average, cut = [self._deltas(file) for file in self.files]
        base = base_weights(self._study.sdxl.unet, average)
        points = dict(zip(MEMBER_NAMES, (merged(base, member) for member in members), strict=True))
        points |= {BASE: base, AVERAGE: merged(base, average), CUT: merged(base, cut)}
        strength = distance(points[AVERAGE], base) / distance(points[MEMBER_NAMES[0]], base)
        return points | {WEAKENED: merged(base, members[0], strength)}

    @cached_property
    def probes(self) -> dict[str, Probe]:
        """The icons of each set under the draws of the group."""
        sdxl, draws = self._study.sdxl, self._config.probe_draws
        return {
            name: fixed_probe(sdxl, samples, sdxl.resolution, self.number, draws)
            for name, samples in self._samples.items()
        }

    def losses(self) -> dict[str, IconLosses]:
        """By set, as functions of the weights."""
        unet, objective = self._study.sdxl.unet, Objective(self._study.sdxl.scheduler)
        return {
            name: loss_at(unet, partial(draw_losses, objective=objective, probe=probe))
            for name, probe in self.probes.items()
        }

    def at_point(self, point: str) -> dict[str, Figures]:
        """All measures of both sets at a point; the trace, which costs most, at the `CURVED` ones alone."""
        weights, config, sdxl = self.weights[point], self._config, self._study.sdxl
        found = {}
        for name, losses in self.losses().items():
            rises = icon_rises(losses, weights, config.sigmas, config.rise_draws, self.number)
            loss = probe_loss_at(sdxl.unet, Objective(sdxl.scheduler), self.probes[name], config.probe_batch_size)
            with evaluating(sdxl.unet):
                worst = worst_rises(loss, weights, config.radii)
            figures = {
                "loss": _joined(losses(weights).mean(dim=1).tolist()),
                **{f"rise {sigma:g}": _joined(of.tolist()) for sigma, of in zip(config.sigmas, rises, strict=True)},
                **{f"worst {radius:g}": _joined([rise]) for radius, rise in zip(config.radii, worst, strict=True)},
            }
            if point in CURVED:
                with evaluating(sdxl.unet), twice_differentiable(sdxl.unet):
                    curvature = trace(loss, weights, "filter", config.trace_probes, self.number)
                figures["trace"] = _joined([curvature.mean])
            found[name] = figures
        return found

    def along(self, one: str, other: str) -> dict[str, list[str]]:
        """By set, each icon's loss at the places `BETWEEN` of a segment."""
        places = [between(self.weights[one], self.weights[other], place) for place in BETWEEN]
        return {
            name: [_joined(losses(weights).mean(dim=1).tolist()) for weights in places]
            for name, losses in self.losses().items()
        }

    def lengths(self) -> dict[str, float]:
        """Of each point's update, and the members' mean distances from each other and from the average."""
        points = self.weights
        members = [points[name] for name in MEMBER_NAMES]
        pairs = [distance(members[one - 1], members[one]) for one in range(MEMBERS)]
        return {
            **{name: round(distance(points[name], points[BASE]), 4) for name in POINTS},
            "between members": round(sum(pairs) / MEMBERS, 4),
            "member to average": round(sum(distance(one, points[AVERAGE]) for one in members) / MEMBERS, 4),
        }

    @cached_property
    def plane(self) -> Plane:
        return plane_through([self.weights[name] for name in MEMBER_NAMES])

    def plane_axis(self) -> list[float]:
        reach = max(float(torch.tensor(at).norm()) for at in self.plane.members)
        return axis(self._config.extent * reach, self._config.surface_points)

    def plane_row(self, row: int) -> dict[str, list[float]]:
        """By set, the mean losses over the plane in one row of points."""
        at = self.plane_axis()
        points = [self.plane.at(a, at[row]) for a in at]
        return {
            name: [round(float(losses(weights).mean()), 8) for weights in points]
            for name, losses in self.losses().items()
        }

    def _deltas(self, file: Path) -> Deltas:
        with loras_loaded(self._study.sdxl.pipeline, [LoraFile(file)]):
            return lora_deltas(self._study.sdxl.unet)


@torch.no_grad()
def icon_rises(losses: IconLosses, weights: Weights, sigmas: Sequence[float], draws: int, seed: int) -> list[Tensor]:
    """`flatness.landscape.expected_rise` of each icon alone, (icons,) for each sigma."""
    scale, clean = scales(weights, "filter"), losses(weights)
    totals = [torch.zeros_like(clean) for _ in sigmas]
    for draw in range(draws):
        eps = noise(scale, weights, seed, draw)
        for sigma, total in zip(sigmas, totals, strict=True):
            total += sum(losses(shifted(weights, eps, sign * sigma)) for sign in (1, -1)) / 2 - clean
    return [total.mean(dim=1) / draws for total in totals]


def between(one: Weights, other: Weights, place: float) -> Weights:
    """The point of a segment: `one` at 0, `other` at 1."""
    return {name: torch.lerp(weight, other[name], place) for name, weight in one.items()}


def distance(one: Weights, other: Weights) -> float:
    return float(
        torch.stack([(weight - other[name]).double().square().sum() for name, weight in one.items()]).sum().sqrt()
    )


def plane_through(points: Sequence[Weights]) -> Plane:
    """The plane through three points with their mean as origin; `across` leads from the first to the second.

    `across` and `along` are orthogonal and of length 1 (Gram-Schmidt of the differences).
    """
    first, second, third = (torch.cat([weight.double().flatten() for weight in point.values()]) for point in points)
    mean = (first + second + third) / 3
    across = (second - first) / (second - first).norm()
    along = third - first
    along = along - (along @ across) * across
    along = along / along.norm()
    members = [[float((point - mean) @ one) for one in (across, along)] for point in (first, second, third)]
    like = points[0]
    return Plane(_split(mean, like), _split(across, like), _split(along, like), members)


def _split(flat: Tensor, like: Weights) -> Weights:
    parts = flat.split([weight.numel() for weight in like.values()])
    return {name: part.view_as(weight).to(weight) for (name, weight), part in zip(like.items(), parts, strict=True)}


def _joined(values: Sequence[float]) -> str:
    return " ".join(f"{value / UNIT:.2f}" for value in values)


class Pieces:
    """What is measured, each in a file below a work folder that has the name of all that it depends on."""

    def __init__(self, folder: Path, config: FlatnessConfig, icons: dict[str, list[str]]) -> None:
        self._folder, self._common = folder, [dataclasses.asdict(config), icons]

    def measured(self, group: Group, what: str, measure: Callable[[], Any]) -> Any:
        key = json.dumps([*self._common, group.number, [file_sha256(file) for file in group.files], what])
        file = self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, measure())
            print(f"group {group.number}: {what}", flush=True)
        return json.loads(file.read_text(encoding="utf-8"))


def measure(
    study: Study, style: Style, work: Path, groups: int, config: FlatnessConfig = CONFIG, heldout: int = HELDOUT_ICONS
) -> dict[str, Any]:
    """The JSON: train and measure what is missing below `work`."""
    samples = {TRAINING: load_samples(style.training).samples, HELDOUT: study.samples[HELDOUT][:heldout]}
    icons = {name: [sample.id for sample in of] for name, of in samples.items()}
    pieces = Pieces(work, config, icons)
    all_groups = [Group(study, samples, group, config) for group in range(groups)]
    first = all_groups[0]
    points: dict[str, Any] = {}
    segments: dict[str, Any] = {}
    rows = [
        pieces.measured(first, f"row {row} of the plane", partial(first.plane_row, row))
        for row in range(config.surface_points)
    ]
    for group in all_groups:
        points[str(group.number)] = {
            point: pieces.measured(group, point, partial(group.at_point, point)) for point in POINTS
        }
        segments[str(group.number)] = {
            f"{one} to {other}": pieces.measured(group, f"{one} to {other}", partial(group.along, one, other))
            for one, other in SEGMENTS
        }
    return {
        "settings": SETTINGS,
        "flatness": {
            name: getattr(config, name) for name in ("sigmas", "rise_draws", "radii", "trace_probes", "probe_draws")
        },
        "seeds": {str(group): [seed_of(group, member) for member in range(MEMBERS)] for group in range(groups)},
        "icons": icons,
        "between": BETWEEN,
        "lengths": {str(group.number): pieces.measured(group, "lengths", group.lengths) for group in all_groups},
        "points": points,
        "segments": segments,
        "plane": {
            **pieces.measured(
                first, "places in the plane", lambda: {"axis": first.plane_axis(), "members": first.plane.members}
            ),
            "losses": {name: [row[name] for row in rows] for name in icons},
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="work folder of benchmarks.populations, or a new one")
    parser.add_argument("--groups", type=int, default=5, help="groups of three seeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)  # of every file that is loaded the same
    torch.set_num_threads(options.threads)
    work = options.work.resolve()
    style = style_3d(work / "packages", work)
    study = Study(style, work / "3d")
    record.save(options.out, measure(study, style, work / "3d" / "average-flatness", options.groups))


if __name__ == "__main__":
    main()
