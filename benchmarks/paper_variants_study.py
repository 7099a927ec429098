"""One base and all that is trained on it in `paper_variants`: where it lies, what is shared, what it will cost."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.paper_text_to_image import SETTINGS
from benchmarks.paper_variants_bench import MOST, Bench, Icons, few_images
from benchmarks.paper_variants_felt import felt_left, stress_left
from benchmarks.paper_variants_figures import Result, Row, compared
from benchmarks.paper_variants_forgetting import curves_left
from benchmarks.paper_variants_groups import planned_groups
from benchmarks.paper_variants_icons import icons_3d, icons_of_second_style
from benchmarks.paper_variants_plan import Group
from benchmarks.paper_variants_tuned import METHODS, NEED_OPTUNA, trial_group
from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.timing import seconds_per_pass
from flatlora_diffusion.config import ModelConfig, TrainConfig, preset_file
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.ground.saved_settings import portable
from flatlora_diffusion.sdxl.pipeline import load_sdxl

MEMORY_ONLY = ("mixed_precision", "gradient_checkpointing", "cache_latents")


class Study:
    """One base with all its benches, made when a part first needs them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.sdxl = load_sdxl(ModelConfig(options.base), record.DEVICE, torch.float32)
        self._packages, self._icons = options.icons or options.work, options.work
        settings = SETTINGS | {
            "pretrained_model_name_or_path": options.base,
            "learning_rate": options.learning_rate,
            "max_train_steps": options.steps,
            "perturb_draw": "low_rank",
            "perturb_norm_every": 10,
        }
        self.settings = settings
        identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        self.work = (options.work / f"base-{base_fingerprint(self.sdxl.unet)[:12]}-{identity}").resolve()
        self._benches: dict[str, Bench] = {}

    @cached_property
    def icons(self) -> Icons:
        return icons_3d(self._packages.resolve(), self._icons.resolve())

    def bench(self, group: Group) -> Bench:
        """What trains and measures a group: the runs of another number of images or steps lie apart."""
        icons, steps = self.icons, round(self.options.steps * group.length)
        name = "runs"
        if group.domain:
            icons, name = icons_of_second_style(self._packages.resolve(), self._icons.resolve()), "second-style"
        if group.images is not None:
            name = f"runs-{group.images}-images"
            icons = replace(icons, training=few_images(icons.training, group.images, self.work / f"{name}-icons"))
        if group.length != 1:
            name = f"runs-{steps}-steps"
        changes: dict[str, Any] = {"max_train_steps": steps}
        if group.preset is not None:
            changes, name = settings_of_preset(group.preset), f"preset-{group.preset}"
        if name not in self._benches:
            most = {key: min(value, self.options.at_most or value) for key, value in MOST.items()}
            self._benches[name] = Bench(
                self.sdxl, self.config(icons.training, name, **changes), icons, self.work / "measured", most
            )
        return self._benches[name]

    def config(self, images: Path, name: str, **changes: Any) -> TrainConfig:
        places = {"instance_data_dir": str(images), "output_dir": str(self.work / name)}
        return TrainConfig.from_dict(self.settings | places | changes)

    def rows(self, group: Group) -> list[Row]:
        return self.bench(group).rows(group, self.options.workers, self.options.cluster)

    def compared(self, groups: Mapping[str, Group]) -> tuple[list[Row], list[Result]]:
        """All groups' rows, and the differences of their pairs, each group by its label."""
        rows, pairs = [], []
        for label, group in groups.items():
            found = self.rows(group)
            pairs += compared(found, group.pairs, self.bench(group).base(), label)
            rows += [{**row, "label": label} for row in found]
        return rows, pairs

    def shared(self, part: str) -> Result:
        """What every part's result says."""
        bench = self.bench(planned_groups(part, self.options)[0])
        return {
            "fingerprint": base_fingerprint(self.sdxl.unet)[:16],
            "settings": portable(self.settings),
            "base": bench.base(),
        }

    def say_estimate(self) -> None:
        """What is left of each part, in core-minutes on this machine as it is now; a run that parts share counts once.

        Likely arms stand for those that the map and the trials are still to choose.
        """
        measured_apart: dict[str, Callable[[Bench, PlannedRun], float]] = {
            "felt": partial(felt_left, other_base=self.options.other_base),
            "again": stress_left,
            "forgetting": curves_left,
        }
        each, whole = seconds_per_pass(self.sdxl, self.sdxl.resolution), 0.0
        seen: set[Path] = set()
        for part in self.options.parts:
            trials = [trial_group(method, self.options.trials) for method in METHODS if part in NEED_OPTUNA]
            runs = [
                (self.bench(group), planned, group.trial)
                for group in (*trials, *planned_groups(part, self.options))
                for planned in self.bench(group).planned(group)
            ]
            new = [run for run in runs if run[1].run.folder not in seen]
            seen |= {planned.run.folder for _, planned, _ in runs}
            if part in measured_apart:
                passes = sum(measured_apart[part](bench, planned) for bench, planned, is_trial in runs if not is_trial)
                passes += sum(bench.training_left(planned) for bench, planned, is_trial in new if not is_trial)
                passes += sum(bench.left(planned, True) for bench, planned, is_trial in new if is_trial)
            else:
                passes = sum(bench.left(planned, is_trial) for bench, planned, is_trial in new)
            minutes = passes * each * self.options.threads / 60
            whole += minutes
            print(f"{part}: {len(new)} runs of its own, about {minutes:.0f} core-minutes are left", flush=True)
        print(f"in all about {whole:.0f} core-minutes, {whole / 60:.1f} hours", flush=True)


def settings_of_preset(name: str) -> dict[str, Any]:
    """All that a preset sets but for its method, which the arms have, and what only saves memory."""
    values: dict[str, Any] = json.loads(preset_file(name).read_text(encoding="utf-8"))
    return {key: value for key, value in values.items() if key not in ("method", *MEMORY_ONLY)}
