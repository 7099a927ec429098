"""A fair pair: LoRA and Flat-LoRA trained alike, then the same prompts, seeds and losses for base, LoRA and Flat-LoRA.

Both arms share one config, data set, LoRA initialization and every draw but eps; each trains in a process of its own.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from flatlora_diffusion.config import DEFAULT_SIGMA, RunError, TrainConfig
from flatlora_diffusion.dataset import load_samples
from flatlora_diffusion.evaluation import Probe, fixed_probe, loss_rise, probe_loss
from flatlora_diffusion.generate import generate_images
from flatlora_diffusion.grid import labelled_grid
from flatlora_diffusion.lora_file import LORA_FILE
from flatlora_diffusion.loss import Objective
from flatlora_diffusion.run_dir import PATH_SETTINGS, RunDir, portable
from flatlora_diffusion.sdxl import Sdxl, load_sdxl
from flatlora_diffusion.training_set import load_training_set

logger = logging.getLogger(__name__)

BASE = "base"
ARMS = {"lora": "LoRA", "flat-lora": "Flat-LoRA"}
RISE_DRAWS = 8
PICTURES = 8


@dataclass(frozen=True)
class Row:
    """The figures of the base or of one arm; what does not apply is None."""

    name: str
    clean_train_loss: float
    heldout_loss: float
    loss_rise: float | None
    loss_rise_error: float | None
    seconds_per_step: float | None
    peak_memory_mib: float | None


def compare(config: TrainConfig, heldout: Path, prompts: Sequence[str]) -> Path:
    """Train both arms into `output_dir`, measure them and draw `compare.png`; returns its path.

    `heldout` is a folder of images of the same style with captions, never trained on. A finished arm with the same
    settings is not trained again. Raises ConfigError for wrong input, RunError when an arm could not be trained.
    """
    out = Path(config.run.output_dir)
    runs = {method: _train_arm(config, method, out / method) for method in ARMS}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sdxl = load_sdxl(config.model, device, torch.float32)
    resolution = config.data.resolution or sdxl.resolution
    data = config.data
    sets = {
        "train": load_training_set(data),
        "heldout": load_samples(heldout, data.instance_prompt),
    }
    probes = {
        kind: fixed_probe(sdxl, found.samples, resolution, seed=0, background=data.background_color)
        for kind, found in sets.items()
    }
    rows, pictures = [], []
    for name in (BASE, *ARMS):
        if name != BASE:
            sdxl.pipeline.load_lora_weights(runs[name].folder / LORA_FILE)
        rows.append(_measure(sdxl, name, probes, runs.get(name)))
        pictures.append(_generate(sdxl, prompts[:PICTURES], resolution))
        if name != BASE:
            sdxl.pipeline.unload_lora_weights()
    return _report(out, rows, pictures, prompts[:PICTURES], config)


def table(rows: Sequence[Row]) -> str:
    """The figures as a Markdown table."""
    lines = [
        "| | clean train loss | held-out loss | loss rise under eps | s/step | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        rise = "" if row.loss_rise is None else f"{row.loss_rise:.5f} ± {row.loss_rise_error:.5f}"
        seconds = "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}"
        memory = "" if row.peak_memory_mib is None else f"{row.peak_memory_mib:.0f} MiB"
        name = ARMS.get(row.name, "Base")
        losses = f"{row.clean_train_loss:.4f} | {row.heldout_loss:.4f}"
        lines.append(f"| {name} | {losses} | {rise} | {seconds} | {memory} |")
    return "\n".join(lines)


def _train_arm(config: TrainConfig, method: str, folder: Path) -> RunDir:
    """Train one arm with the command line's own code in a subprocess, unless it is there already."""
    sigma = config.perturb.sigma if method == "flat-lora" else None
    arm = config.replace(method=method, sigma=sigma, output_dir=str(folder))
    run = RunDir(folder)
    if _is_finished(run, arm):
        logger.info("%s: already trained in %s", ARMS[method], folder)
        return run
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = folder.parent / f"{method}.json"
    settings.write_text(json.dumps(portable(arm.to_dict()), indent=2) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "flatlora_diffusion", "train", "--config", str(settings)]
    paths = {name: value for name, value in arm.to_dict().items() if name in PATH_SETTINGS and value}
    command += [f"--{name}={value}" for name, value in paths.items()]  # the saved ones may be cut to their names
    done = subprocess.run(command)
    if done.returncode != 0:
        raise RunError(f"training {ARMS[method]} ended with exit code {done.returncode}; its message is above")
    return run


def _is_finished(run: RunDir, arm: TrainConfig) -> bool:
    """Whether `run` has a result made with these settings (those that `arm` leaves open may have any value)."""
    events = run.events()
    if not events or events[-1]["event"] != "finished" or not (run.folder / LORA_FILE).exists():
        return False
    saved = run.config()
    wanted = {name: value for name, value in portable(arm.to_dict()).items() if value is not None}
    return all(saved.get(name) == value for name, value in wanted.items())


def _measure(sdxl: Sdxl, name: str, probes: dict[str, Probe], run: RunDir | None) -> Row:
    losses = {kind: probe_loss(sdxl.unet, Objective(sdxl.scheduler), probe) for kind, probe in probes.items()}
    if run is None:
        return Row(name, losses["train"], losses["heldout"], None, None, None, None)
    rises = loss_rise(sdxl.unet, Objective(sdxl.scheduler), probes["train"], DEFAULT_SIGMA, RISE_DRAWS, seed=0)
    steps = [event for event in run.events() if event["event"] == "step"]
    return Row(
        name,
        losses["train"],
        losses["heldout"],
        statistics.mean(rises),
        statistics.stdev(rises) / len(rises) ** 0.5,
        statistics.median(event["seconds"] for event in steps),
        max(event["memory"] for event in steps) / 2**20,
    )


def _generate(sdxl: Sdxl, prompts: Sequence[str], resolution: int) -> list[Image.Image]:
    return generate_images(sdxl, prompts, list(range(len(prompts))), resolution)


def _report(
    out: Path, rows: Sequence[Row], pictures: list[list[Image.Image]], prompts: Sequence[str], config: TrainConfig
) -> Path:
    caption = f"same prompts, seeds and settings; {config.optim.max_train_steps} steps; none of these was trained on"
    grid = labelled_grid(pictures, ["Base", *ARMS.values()], prompts, caption=caption)
    path = out / "compare.png"
    grid.save(path)
    (out / "compare.json").write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
    (out / "compare.md").write_text(table(rows) + "\n", encoding="utf-8")
    return path
