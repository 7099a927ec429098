"""`evidence`: what it downloads, told before; the comparison; and its figures in one file without personal data."""

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

from flatlora_diffusion.compare.arms import folder_of
from flatlora_diffusion.compare.comparison import compare
from flatlora_diffusion.compare.evidence.defaults import BASE, ENCODERS
from flatlora_diffusion.config import TINY, CompareConfig, TrainConfig, choices_of, setting_hints
from flatlora_diffusion.storage.atomic_io import write_json
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.versions import PROGRAM, __version__

logger = logging.getLogger(__name__)

FILE = "evidence.json"
_DOWNLOADS = {BASE: 6.9e9, ENCODERS[0]: 1.7e9, ENCODERS[1]: 0.35e9}  # bytes; the base's in half precision
_GB = 1e9
# Settings that are texts, and no more personal than a number.
_PLAIN_TEXTS = ("lora_target_modules", "lora_unet_blocks", "lora_block_ranks", "background_color")


def evidence(config: TrainConfig, own: CompareConfig) -> Path:
    """Make the comparison that the settings describe and write evidence.json beside its report; returns its path.

    Raises ConfigError when the disk has not the room that it takes.
    """
    told = downloads(config, own)
    if told:
        logger.info("%s", told)
    folder = compare(config, own)
    file = folder / FILE
    write_json(file, sheet(folder))
    return file


def downloads(config: TrainConfig, own: CompareConfig) -> str:
    """What is downloaded before anything else, with its size; empty if all is here."""
    names = [config.model.pretrained_model_name_or_path, *own.encoders]
    wanted = [name for name in names if name in _DOWNLOADS and not _is_here(name)]
    total = sum(_DOWNLOADS[name] for name in wanted)
    return f"Downloads about {total / _GB:.1f} GB first: {', '.join(wanted)}" if wanted else ""


def sheet(folder: Path) -> dict[str, Any]:
    """The figures of a comparison with device and versions, and nothing that tells of a person.

    No path, prompt, file name or free text of the settings: the base and the encoders by hub id alone.
    """
    result = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    runs = [RunDir(folder_of(folder, arm, seed)) for arm, seeds in result["values"].items() for seed in seeds]
    return {
        "program": PROGRAM,
        "version": __version__,
        "system": f"{platform.system()} {platform.machine()}",
        "device": result["device"],
        "device_memory": torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "versions": result["versions"],
        "settings": _impersonal(result["settings"]),
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
        "runs": [_run(run) for run in runs],
    }


def _run(run: RunDir) -> dict[str, Any]:
    """Time, memory and losses of a run, and what it found of itself."""
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


def _impersonal(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are numbers, switches or choices, and the models that have a public name."""
    hints = setting_hints()
    kept = {
        name: value
        for name, value in settings.items()
        if name in hints and (not isinstance(value, str) or choices_of(hints[name]) or name in _PLAIN_TEXTS)
    }
    kept["pretrained_model_name_or_path"] = _public(settings["pretrained_model_name_or_path"])
    kept["encoders"] = [_public(name) for name in settings["encoders"]]
    kept["arms"] = list(settings["arms"])
    return kept


def _public(name: str) -> str:
    return name if name in (TINY, "judge", *_DOWNLOADS) else "another one"


def _is_here(name: str) -> bool:
    file = "model_index.json" if name == BASE else "config.json"
    try:
        return Path(name).exists() or isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return True
