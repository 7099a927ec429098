"""Does eps help more by timestep, or in opposite pairs? `python -m benchmarks.noise_shapes --work FOLDER`

LoRA; Flat-LoRA with one sigma; with a sigma that grows with the timestep, or falls; and with eps and -eps for the two
halves of a step: with the attention layers alone, and with the demo's layers, which feel a sigma more. All arms of a
seed share images, first weights, noise and timesteps; the mean sigma over timesteps is the same. An optimizer step has
two micro-batches of one image, so that each has its own timestep. Held-out and clean training loss are those of
`paired_draws`, the loss rise is of the training images; differences are paired by seed. Nothing is done twice. Writes
benchmarks/noise_shapes.json when all is done, about two hours of a core. None of these is in the product: it would be
if one ended better than both one sigma and LoRA.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.paired_draws import config_of, evaluator_of, in_words, measured
from benchmarks.paper_flatness import table as paper_table
from benchmarks.paper_variants_answer import verdict
from benchmarks.paper_words import UNIT, interval
from flatlora_diffusion import FlatLora
from flatlora_diffusion.compare.losses import UNGROUPED
from flatlora_diffusion.compare.material import HELDOUT_FOLDER, SAMPLE_ICONS
from flatlora_diffusion.compare.paired import paired_difference
from flatlora_diffusion.config import TINY, ModelConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.ground.run_dir import LORA_FILE
from flatlora_diffusion.method.step_gradient import StepGradient
from flatlora_diffusion.sdxl.pipeline import load_sdxl
from flatlora_diffusion.training.beginning.first_weights import first_weights
from flatlora_diffusion.training.checkpoint import start
from flatlora_diffusion.training.saving import save_lora
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train_step

SIGMA = 0.4
SETTINGS: dict[str, Any] = {
    "method": "lora",  # as the product sees it: eps is put on here
    "learning_rate": 5e-4,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "report_to": "none",
}
LAYERS: dict[str, dict[str, Any]] = {
    "attention, rank 4": {"lora_target_modules": "attn", "rank": 4},
    "the demo's, rank 16": {},
}
Shape = Callable[[float, int], tuple[float, int]]
"""From the timestep, 0 to 1, and the micro-batch: sigma, negative for -eps, and the number of the draw."""
ARMS: dict[str, Shape | None] = {
    "LoRA": None,
    "one sigma": lambda noisy, slot: (SIGMA, slot),
    "more at noisy timesteps": lambda noisy, slot: (2 * SIGMA * noisy, slot),
    "more at clean timesteps": lambda noisy, slot: (2 * SIGMA * (1 - noisy), slot),
    "opposite pairs": lambda noisy, slot: (SIGMA * (1 - 2 * (slot % 2)), slot // 2),
}
Figures = dict[str, list[dict[str, float]]]
"""Of the runs of an arm, seed by seed."""
METRICS = ("heldout", "train", "rise")
RISE_DRAWS = 2


class Signed(FlatLora):
    """A FlatLora whose sigma may be negative: -eps."""

    def _strength(self, step: int, sigma: float | None) -> float:
        return self.sigma_at(step) if sigma is None else sigma


class Shaped(StepGradient):
    """The gradient at W + eps, each micro-batch with sigma and draw by its timestep and number."""

    def __init__(self, flat: FlatLora, shape: Shape, timesteps: int) -> None:
        self._flat, self._shape, self._timesteps = flat, shape, timesteps

    def take(self, step: int, micro_batches: Iterable[Any]) -> list[Tensor]:
        losses = []
        for one in micro_batches:
            sigma, draw = self._shape(float(one.loss.args[-1]) / self._timesteps, one.slot)
            with self._flat.perturb(step, draw, sigma):
                losses.append(one.backward())
        return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and measurements")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--base", default=TINY)
    parser.add_argument("--data", type=Path, default=SAMPLE_ICONS, help="with held-out images in a folder of it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sdxl = load_sdxl(ModelConfig(pretrained_model_name_or_path=args.base), record.DEVICE, torch.float32)
    heldout, training = load_samples(args.data / HELDOUT_FOLDER).samples, load_samples(args.data).samples
    found: dict[str, Any] = {}
    for layers, of_layers in LAYERS.items():
        settings = SETTINGS | of_layers
        identity = hashlib.sha256(json.dumps([settings, SIGMA, str(args.data.resolve())]).encode()).hexdigest()[:8]
        work = args.work / f"base-{base_fingerprint(sdxl.unet)[:12]}-{identity}"
        evaluator = evaluator_of(sdxl, heldout, training, work)
        figures: Figures = {}
        for seed in range(args.seeds):
            for arm in ARMS:
                file = trained(arm, seed, args, work, settings)
                figures.setdefault(arm, []).append(measured(evaluator, file, "train", RISE_DRAWS))
            print(f"{layers}, {seed + 1} seed(s)\n{table(figures)}", flush=True)
        used = config_of(args, work, 0, **settings).adapter
        named = {"lora_target_modules": used.lora_target_modules, "rank": used.rank}
        found[layers] = {"settings": named, "figures": figures, "differences": differences(figures)}
    base = {name: values[UNGROUPED] for name, values in evaluator.losses(None).items()}
    record.save(
        args.out,
        {"settings": {**SETTINGS, "sigma": SIGMA, "steps": args.steps}, "base": base, "layers": found},
    )


def trained(arm: str, seed: int, args: argparse.Namespace, work: Path, settings: dict[str, Any]) -> Path:
    """The LoRA file of a run."""
    folder = work / f"{arm.replace(' ', '-')}-{seed}-{args.steps}"
    if not (folder / LORA_FILE).is_file():
        config = config_of(args, folder, seed, **settings)
        state = prepare(config, load_samples(args.data).samples)
        first_weights(state)
        start(state)
        shape = ARMS[arm]
        if shape is not None:
            flat = Signed(state.model, schedule="constant", draw="low_rank", seed=seed)
            state.gradient = Shaped(flat, shape, state.objective.scheduler.config.num_train_timesteps)
        for step in range(args.steps):
            train_step(state, step)
        save_lora(state, folder, args.steps, is_end=True)
    return folder / LORA_FILE


def differences(figures: Figures) -> dict[str, Any]:
    """Of each arm to LoRA, and of each shape to one sigma, by metric."""
    pairs = {*((arm, "LoRA") for arm in list(ARMS)[1:]), *((arm, "one sigma") for arm in list(ARMS)[2:])}
    return {
        f"{one} - {other}": {
            metric: asdict(
                paired_difference([row[metric] for row in figures[one]], [row[metric] for row in figures[other]])
            )
            for metric in METRICS
        }
        for one, other in sorted(pairs, reverse=True)
    }


def section(found: dict[str, Any]) -> str:
    """What docs/variants.md says of the JSON."""
    settings, first = found["settings"], next(iter(found["layers"].values()))
    seeds = len(first["figures"]["LoRA"])
    rows = [
        [
            layers,
            *pair.split(" - "),
            *(interval(metrics[metric], 1) for metric in METRICS),
            verdict(metrics["heldout"]),
        ]
        for layers, one in found["layers"].items()
        for pair, metrics in one["differences"].items()
    ]
    columns = ["layers", "arm", "against", "held-out, at the end", "clean train", "loss rise", "at the end"]
    return (
        f"Sigma {settings['sigma']:g} in the mean over timesteps, constant over the run; two micro-batches of one "
        f"image a step, {settings['steps']} steps, {seeds} seeds, {UNIT}. Opposite pairs "
        "have the same eps with both signs in the two micro-batches of a step. Only what ended better than both one "
        "sigma and LoRA would be in the product (`python -m benchmarks.noise_shapes --work FOLDER`):\n\n"
        f"{paper_table(columns, rows)}"
    )


def table(figures: Figures) -> str:
    lines = ["| arms | held-out, 1e-5 | clean train, 1e-5 | rise, 1e-5 |", "|---|---|---|---|"]
    for pair, metrics in differences(figures).items():
        lines.append(f"| {pair} | {' | '.join(in_words(metrics[metric]) for metric in METRICS)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
