"""The loss around W' of a LoRA and a Flat-LoRA of one seed: the paper's Fig. 6 on a small model.

Both are trained once more, as the study's runs of that seed were. The loss is that of the first validation examples,
321 times for each: with MiniLM about 3 core-minutes a task. docs/results.md shows one task of each study: its
flatness.json is copied to benchmarks/paper_surface_STUDY.json and its surface.png to docs/surface_STUDY.png.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.paper_study_run import Bench, loss_of, train
from benchmarks.paper_study_settings import Settings
from flatlora_diffusion import LandscapeConfig, peft_flatness

CONFIG = LandscapeConfig(sigmas=(0.1, 0.2), surface_points=15, slice_directions=4)
SEED, ROWS = 0, 64
_LAST = "surface.png"  # of the pictures, which are drawn when all figures are written


def draw_surfaces(bench: Bench, pair: Mapping[str, Settings], folder: Path) -> None:
    """Charts and figures of the `pair` in `folder`, which has the task's name, unless they are there already."""
    facts = {
        "task": folder.name,
        "seed": SEED,
        "rows": ROWS,
        "runs": {name: settings.named() for name, settings in pair.items()},
    }
    if not _are_there(folder, facts):
        (folder / _LAST).unlink(missing_ok=True)
        models = {name: train(bench, settings, SEED).adapter.model for name, settings in pair.items()}
        loss = partial(loss_of, data=bench.tests["validation"], most=ROWS)
        peft_flatness(models, loss, folder, CONFIG, facts)
    print(f"Look at {_LAST}, slices.png and rise.png in {folder}", flush=True)


def _are_there(folder: Path, facts: Mapping[str, object]) -> bool:
    """Whether figures of such runs were written and drawn."""
    file = folder / "flatness.json"
    if not file.is_file() or not (folder / _LAST).is_file():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    settings = json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    return found["settings"] == settings and all(found.get(name) == value for name, value in facts.items())
