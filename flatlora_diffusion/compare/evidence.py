"""`evidence`: a comparison on real SDXL, and its figures without personal data in one JSON file for users to post."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from flatlora_diffusion.compare.arms import run_folder
from flatlora_diffusion.compare.comparison import compare
from flatlora_diffusion.compare.evidence_defaults import BASE, ENCODERS
from flatlora_diffusion.config import TINY, CompareConfig, TrainConfig, choices_of, setting_hints
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.versions import PROGRAM, __version__

logger = logging.getLogger(__name__)

FILE = "evidence.json"
_DOWNLOADS = {BASE: 6.9e9, ENCODERS[0]: 1.7e9, ENCODERS[1]: 0.35e9}  # bytes; the base in half precision
_GB = 1e9
# Settings of type text that contain nothing personal.
_PUBLIC_TEXTS = ("lora_target_modules", "lora_unet_blocks", "lora_block_ranks", "background_color")


def evidence(config: TrainConfig, options: CompareConfig) -> Path:
    """Run the comparison and write evidence.json beside its report; return its path. Raises as `compare`."""
    note = downloads(config, options)
    if note:
        logger.info("%s", note)
    folder = compare(config, options)
    file = folder / FILE
    write_json(file, public_figures(folder))
    return file


def downloads(config: TrainConfig, options: CompareConfig) -> str:
    """Name the models that must be downloaded first, with their size; empty if there are none."""
    names = [config.model.pretrained_model_name_or_path, *options.encoders]
    missing = [name for name in names if name in _DOWNLOADS and not _is_downloaded(name)]
    total = sum(_DOWNLOADS[name] for name in missing)
    return f"Downloading about {total / _GB:.1f} GB first: {', '.join(missing)}" if missing else ""


def public_figures(folder: Path) -> dict[str, Any]:
    """Collect a comparison's figures with device and versions, without personal data.

    Paths, prompts, file names and free texts of the settings are omitted; models are named by hub id only.
    """
    result = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    runs = [RunDir(run_folder(folder, arm, seed)) for arm, seeds in result["values"].items() for seed in seeds]
    return {
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
    }


def _run_figures(run: RunDir) -> dict[str, Any]:
    """Time, memory, losses and self-checks of a run."""
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
    return name if name in (TINY, "judge", *_DOWNLOADS) else "another one"


def _is_downloaded(name: str) -> bool:
    file = "model_index.json" if name == BASE else "config.json"
    try:
        return Path(name).exists() or isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return True
