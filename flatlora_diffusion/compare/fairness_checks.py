"""Checks that the runs of an experiment were trained under equal conditions, by hashes from their folders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.compare.controls import OTHER_DRAWS
from flatlora_diffusion.config import TrainConfig, method_settings, settings_with

_HASH_DIGITS = 16  # hex digits
# These settings do not affect the training.
_FOLDER_SETTINGS = {"output_dir", "output_name", "checkpointing_steps", "instance_data_dir"}
# Runs that differ in these settings have different initial weights, or different draws.
_WEIGHT_SETTINGS = set(settings_with("affects", "weights"))
_DRAW_SETTINGS = set(settings_with("affects", "draws"))

Runs = Mapping[str, PlannedRun]
"""Runs by their label in the report."""


def shared_conditions(runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Compare images and base of all runs, then settings, initial weights and draws of the runs of each seed.

    Each condition `what` has the hash of each run and `holds` if they are equal.
    """
    labelled = {run.label: run for run in runs}
    conditions = [
        _condition("training images and captions", labelled, _images),
        _condition("base model", labelled, lambda run: str(_start(run)["base"])),
    ]
    for seed in dict.fromkeys(run.seed for run in runs):
        conditions += _conditions_of_seed(seed, {label: run for label, run in labelled.items() if run.seed == seed})
    return conditions


def _conditions_of_seed(seed: int, runs: Runs) -> list[dict[str, Any]]:
    of_arms = {name for run in runs.values() for name in run.arm.changes}
    shape = _shape(next(iter(runs.values())))
    with_weights = {label: run for label, run in runs.items() if _shape(run) == shape}
    with_draws = {label: run for label, run in runs.items() if _has_shared_draws(run)}
    return [
        _condition(f"all settings but the arm's own, seed {seed}", runs, lambda run: _settings(run, of_arms)),
        _condition(
            f"initial weights of the LoRA, seed {seed}",
            with_weights,
            lambda run: str(_start(run)["lora"]),
            _exclusion_note(runs, with_weights, "another rank or other layers"),
        ),
        _condition(
            f"images, crops, noise and timesteps of every step, seed {seed}",
            with_draws,
            _draws,
            _exclusion_note(runs, with_draws, "different draws, as intended"),
        ),
    ]


def _condition(what: str, runs: Runs, hash_of: Callable[[PlannedRun], str], note: str = "") -> dict[str, Any]:
    hashes = {label: hash_of(run) for label, run in runs.items()}
    short = {label: digits[:_HASH_DIGITS] for label, digits in hashes.items()}
    return {"what": what, "hashes": short, "holds": len(set(hashes.values())) <= 1, "note": note}


def _shape(run: PlannedRun) -> dict[str, Any]:
    """The settings that determine the initial weights."""
    settings = run.config.to_dict()
    init_seed = settings["seed"] if settings["lora_init_seed"] is None else settings["lora_init_seed"]
    return {name: settings[name] for name in _WEIGHT_SETTINGS} | {"lora_init_seed": init_seed}


def _has_shared_draws(run: PlannedRun) -> bool:
    return run.arm.key != OTHER_DRAWS and not _DRAW_SETTINGS & set(run.arm.changes)


def _exclusion_note(runs: Runs, compared: Runs, reason: str) -> str:
    excluded = [label for label in runs if label not in compared]
    return f"{', '.join(excluded)}: {reason}" if excluded else ""


def _images(run: PlannedRun) -> str:
    return _sha256([[row["sha256"], row["caption_sha256"]] for row in run.run.manifest()])


def _settings(run: PlannedRun, of_arms: Collection[str]) -> str:
    """Hash the run's settings without its folders and without those that any arm of its seed changes."""
    excluded = {"method", *method_settings(), *_FOLDER_SETTINGS, *of_arms}
    saved = {**TrainConfig().to_dict(), **run.run.config()}
    return _sha256({name: value for name, value in sorted(saved.items()) if name not in excluded})


def _start(run: PlannedRun) -> Mapping[str, Any]:
    starts = [event for event in run.run.events() if event["event"] == "start"]
    return starts[0] if starts else {"base": "not recorded", "lora": "not recorded"}


def _draws(run: PlannedRun) -> str:
    return _sha256([(event["step"], event["draws"]) for event in run.run.steps()])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
