"""Whether the runs of an experiment were alike: hashes of what they shared, read from their folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.controls import OTHER_DRAWS
from flatlora_diffusion.config import TrainConfig, method_settings, settings_with

_SHOWN = 16  # hex digits
# Where a run lies and how often it saves is not how it was trained.
_PLACES = {"output_dir", "output_name", "checkpointing_steps", "instance_data_dir"}
# Runs that differ in one of these have other first weights, or draw in another order.
_SHAPES = set(settings_with("affects", "weights"))
_FEEDS = set(settings_with("affects", "draws"))

Runs = Mapping[str, PlannedRun]
"""Runs by the label that the report gives them."""


@dataclass(frozen=True)
class SharedCondition:
    """A condition that runs should share, with the hash of each run; `holds` if the hashes are equal."""

    what: str
    hashes: Mapping[str, str]
    holds: bool
    note: str


def shared_conditions(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Images and base of all runs, then settings, first weights and draws of the runs of each seed."""
    labelled = {run.label: run for run in runs}
    conditions = [
        _condition("training images and captions", labelled, _images),
        _condition("base model", labelled, lambda run: str(_start(run)["base"])),
    ]
    for seed in dict.fromkeys(run.seed for run in runs):
        conditions += _conditions_of_seed(seed, {label: run for label, run in labelled.items() if run.seed == seed})
    return [asdict(condition) for condition in conditions]


def _conditions_of_seed(seed: int, runs: Runs) -> list[SharedCondition]:
    of_arms = {name for run in runs.values() for name in run.arm.changes}
    shape = _shape(next(iter(runs.values())))
    with_weights = {label: run for label, run in runs.items() if _shape(run) == shape}
    with_draws = {label: run for label, run in runs.items() if _draws_as_others(run)}
    return [
        _condition(f"all settings but the arm's own, seed {seed}", runs, lambda run: _settings(run, of_arms)),
        _condition(
            f"first weights of the LoRA, seed {seed}",
            with_weights,
            lambda run: str(_start(run)["lora"]),
            _note_of_left_out(runs, with_weights, "another rank or other layers"),
        ),
        _condition(
            f"images, crops, noise and timesteps of every step, seed {seed}",
            with_draws,
            _draws,
            _note_of_left_out(runs, with_draws, "draws of its own, as intended"),
        ),
    ]


def _condition(what: str, runs: Runs, hash_of: Callable[[PlannedRun], str], note: str = "") -> SharedCondition:
    hashes = {label: hash_of(run) for label, run in runs.items()}
    shown = {label: digits[:_SHOWN] for label, digits in hashes.items()}
    return SharedCondition(what, shown, len(set(hashes.values())) <= 1, note)


def _shape(run: PlannedRun) -> dict[str, Any]:
    """All that its first weights depend on."""
    settings = run.config.to_dict()
    own_seed = settings["lora_init_seed"]
    return {name: settings[name] for name in _SHAPES} | {
        "lora_init_seed": settings["seed"] if own_seed is None else own_seed
    }


def _draws_as_others(run: PlannedRun) -> bool:
    return run.arm.key != OTHER_DRAWS and not _FEEDS & set(run.arm.changes)


def _note_of_left_out(runs: Runs, compared: Runs, why: str) -> str:
    left_out = [label for label in runs if label not in compared]
    return f"{', '.join(left_out)}: {why}" if left_out else ""


def _images(run: PlannedRun) -> str:
    return _sha256([[row["sha256"], row["caption_sha256"]] for row in run.run.manifest()])


def _settings(run: PlannedRun, of_arms: Collection[str]) -> str:
    """The hash of the run's settings without its place and without those that tell the arms of its seed apart."""
    own = {"method", *method_settings(), *_PLACES, *of_arms}
    saved = {**TrainConfig().to_dict(), **run.run.config()}
    return _sha256({name: value for name, value in sorted(saved.items()) if name not in own})


def _start(run: PlannedRun) -> Mapping[str, Any]:
    starts = [event for event in run.run.events() if event["event"] == "start"]
    return starts[0] if starts else {"base": "not recorded", "lora": "not recorded"}


def _draws(run: PlannedRun) -> str:
    return _sha256([(event["step"], event["draws"]) for event in run.run.steps()])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
