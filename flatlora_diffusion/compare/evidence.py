"""`evidence`: comparisons on real SDXL, and their figures without personal data in one JSON file for users to post."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flatlora_diffusion.compare.arms import run_folder
from flatlora_diffusion.compare.comparison import compare
from flatlora_diffusion.compare.evidence_check import SCHEMA
from flatlora_diffusion.compare.evidence_defaults import BASE, DOWNLOADS, PARTS, Part
from flatlora_diffusion.compare.experiment import plan_experiment
from flatlora_diffusion.compare.forecast import Forecast, PlannedPart, measured_speeds
from flatlora_diffusion.compare.inputs import free_gpu_memory
from flatlora_diffusion.compare.timing import duration_text
from flatlora_diffusion.config import (
    INCLUDED_BASES,
    CompareConfig,
    EvidenceConfig,
    TrainConfig,
    choices_of,
    setting_hints,
)
from flatlora_diffusion.families.device import has_bf16
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.versions import PROGRAM, __version__

logger = logging.getLogger(__name__)

FILE = "evidence.json"
_GB = 1e9
# Settings of type text that contain nothing personal.
_PUBLIC_TEXTS = ("lora_target_modules", "lora_unet_blocks", "lora_block_ranks", "background_color")


def evidence(config: TrainConfig, options: EvidenceConfig, parts: Sequence[Part] = PARTS) -> Path:
    """Run the parts in order; return the path of evidence.json, which each part writes anew beside its report.

    The same call resumes after a stop. With `options.hours` a part that is expected to end too late does not start.

    Args:
        config: The settings of the trainings, as from `settings_for_gpu`.
        parts: The comparisons; the first always runs.

    Raises:
        ConfigError, RunError: As `compare`.
    """
    forecast = Forecast(
        [_planned(config, part, options) for part in parts], Path(config.run.output_dir), _clock(options.hours)
    )
    note = downloads(config, options)
    if note:
        logger.info("%s", note)
    for number, part in enumerate(parts, 1):
        comparison = options_of(part, options)
        left = forecast.seconds_left()
        if number > 1 and left is not None:
            needed = forecast.part_seconds()[number - 1]
            if needed > left:
                text = f"takes about {duration_text(needed)}, and {duration_text(max(left, 0))} are left"
                logger.info("Part %d of %d, %s, %s: repeat the command to run it", number, len(parts), part.name, text)
                break
        logger.info("Part %d of %d: %s", number, len(parts), part.name)
        folder = compare(config, comparison, forecast)
        file = folder / FILE
        write_json(file, public_figures(folder))
        logger.info("%s has the figures of %s", file, part.name)
        free_gpu_memory()  # for the trainings of the next part
    return file


def _planned(config: TrainConfig, part: Part, options: EvidenceConfig) -> PlannedPart:
    plan = plan_experiment(config, options_of(part, options))
    return PlannedPart(part.name, plan.arm_runs, plan.control_runs)


def _clock(hours: float | None) -> Callable[[], float | None]:
    """Return a function that returns the seconds left of `hours` from now."""
    start = time.monotonic()
    return lambda: None if hours is None else 3600 * hours - (time.monotonic() - start)


def settings_for_gpu(config: TrainConfig, gpu: Literal["t4"] | None, is_rehearsal: bool = False) -> TrainConfig:
    """Set precision and offloading for a GPU without bf16, such as a T4; otherwise bf16 if the GPU has it.

    A given `mixed_precision` wins. A rehearsal without a GPU is for a T4.
    """
    has_gpu = torch.cuda.is_available()
    computes_bf16 = has_gpu and has_bf16(torch.device("cuda"))
    is_t4 = gpu == "t4" or (not computes_bf16 and (has_gpu or is_rehearsal))
    default = ("fp16" if is_t4 else "bf16") if has_gpu or is_rehearsal else None
    precision = config.optim.mixed_precision or default
    return config.replace(mixed_precision=precision, offload=config.model.offload or is_t4)


def options_of(part: Part, options: EvidenceConfig) -> CompareConfig:
    """The settings of `compare` for a part, whose arms, seeds and controls replace those of `options`."""
    values = {field.name: getattr(options, field.name) for field in fields(CompareConfig)}
    return CompareConfig(**{**values, "arms": part.arms, "num_seeds": part.num_seeds, "controls": part.controls})


def downloads(config: TrainConfig, options: CompareConfig) -> str:
    """Name the models that must be downloaded first, with their size; empty if there are none."""
    names = [config.model.pretrained_model_name_or_path, *options.encoders]
    missing = [name for name in names if name in DOWNLOADS and not _is_downloaded(name)]
    total = sum(DOWNLOADS[name] for name in missing)
    return f"Downloading about {total / _GB:.1f} GB first: {', '.join(missing)}" if missing else ""


def public_figures(folder: Path) -> dict[str, Any]:
    """Collect a comparison's figures with device and versions, without personal data.

    Paths, prompts, file names and free texts of the settings are omitted; models are named by hub id only.
    """
    result = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    runs = [RunDir(run_folder(folder, arm, seed)) for arm, seeds in result["values"].items() for seed in seeds]
    return {
        "schema": SCHEMA,
        "program": PROGRAM,
        "version": __version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": result["device"],
        "device_memory": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "versions": result["versions"],
        "settings": _public_settings(result["settings"]),
        "images": {name: value for name, value in result["settings"].items() if name.endswith(" images")},
        "seeds": result["seeds"],
        "verdict": result["verdict"],
        "metrics": result["metrics"],
        "base": result["base"],
        "values": result["values"],
        "paired": result["paired"],
        "trajectories": result["trajectories"],
        "nulls": result["nulls"],
        "is_alike": all(condition["holds"] for condition in result["proof"]),
        "runs": [_run_figures(run) for run in runs],
        "speeds": {kind: speed._asdict() for kind, speed in measured_speeds(folder).items()},
    }


def _run_figures(run: RunDir) -> dict[str, Any]:
    """Time, memory, losses, self-checks of a run, and with fp16 how often its gradients overflowed."""
    events, steps = run.events(), run.steps()
    start = next((event for event in events if event["event"] == "start"), {})
    return {
        "arm": run.folder.parent.name,
        "seed": run.folder.name,
        "base": start.get("base"),
        "steps": len(steps),
        "seconds": round(sum(event["seconds"] for event in steps), 1),
        "memory": max((event["memory"] for event in steps), default=None),
        "losses": [round(event["loss"], 5) for event in steps],
        "skipped_steps": sum(event.get("is_skipped", False) for event in steps),
        "loss_scale": steps[-1].get("loss_scale") if steps else None,
        "selfcheck": [
            {name: value for name, value in event.items() if name != "event"}
            for event in events
            if event["event"] == "selfcheck"
        ],
    }


def _public_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Select the settings that are numbers, switches or choices, and the models with a public name."""
    hints = setting_hints()
    public = {
        name: value
        for name, value in settings.items()
        if name in hints and (not isinstance(value, str) or choices_of(hints[name]) or name in _PUBLIC_TEXTS)
    }
    public["pretrained_model_name_or_path"] = _public_name(settings["pretrained_model_name_or_path"])
    public["encoders"] = [_public_name(name) for name in settings["encoders"]]
    public["arms"] = list(settings["arms"])
    return public


def _public_name(name: str) -> str:
    return name if name in (*INCLUDED_BASES, "judge", *DOWNLOADS) else "another one"


def _is_downloaded(name: str) -> bool:
    file = "model_index.json" if name == BASE else "config.json"
    try:
        return Path(name).exists() or isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return True
