"""Do low-rank draws train what full draws train? `python -m benchmarks.paired_draws --work FOLDER`

LoRA, Flat-LoRA with full draws, with low-rank draws, and with those and norms of every tenth step, the default; on
the 3D icons and the tiny base, seed by seed on the same images, first weights, noise and timesteps. The held-out
loss, the clean training loss and the loss rise at sigma 0.1 are measured at each checkpoint; differences are paired
by seed, with the 95 % interval of Student's t. Nothing is done twice: a run that is stopped goes on, what is measured
is kept. Writes benchmarks/paired_draws.json when all is done.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from flatlora_diffusion.compare.losses import UNGROUPED, ImageSet, LossEvaluator
from flatlora_diffusion.compare.material import HELDOUT_FOLDER, SAMPLE_ICONS
from flatlora_diffusion.compare.paired import paired_difference
from flatlora_diffusion.config import TINY, ModelConfig, TrainConfig, preset_file
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.ground.provenance import base_fingerprint
from flatlora_diffusion.ground.run_dir import LORA_FILE
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.pipeline import Sdxl, load_sdxl
from flatlora_diffusion.training.trainer import train

SETTINGS: dict[str, Any] = {"learning_rate": 5e-4, "report_to": "none"}
FLAT: dict[str, Any] = {"method": "flat-lora", "sigma": 0.4, "sigma_schedule": "constant", "perturb_norm_every": 1}
ARMS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "full": {**FLAT, "perturb_draw": "full"},
    "low-rank": {**FLAT, "perturb_draw": "low_rank"},
    "default": {**FLAT, "perturb_draw": "low_rank", "perturb_norm_every": 10},
}
PAIRS = (("low-rank", "full"), ("default", "low-rank"), ("full", "lora"), ("default", "lora"))
RISE, RISE_DRAWS = 0.1, 4
DRAWS = 8  # (noise, timestep) pairs of each held-out icon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and measurements")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--every", type=int, default=200, help="steps between measurements")
    parser.add_argument("--base", default=TINY)
    parser.add_argument("--data", type=Path, default=SAMPLE_ICONS, help="with held-out images in a folder of it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sdxl = load_sdxl(ModelConfig(pretrained_model_name_or_path=args.base), record.DEVICE, torch.float32)
    work = args.work / f"base-{base_fingerprint(sdxl.unet)[:12]}"  # another base needs other runs
    heldout, training = load_samples(args.data / HELDOUT_FOLDER).samples, load_samples(args.data).samples
    evaluator = evaluator_of(sdxl, heldout, training, work)
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}  # by step, by arm, seed by seed
    for seed in range(args.seeds):
        for arm in ARMS:
            for step, file in trained(arm, seed, args, work).items():
                figures.setdefault(f"{step}", {}).setdefault(arm, []).append(measured(evaluator, file))
        print(table(figures), flush=True)
    base = {name: values[UNGROUPED] for name, values in evaluator.losses(None).items()}
    record.save(
        args.out,
        {"settings": {**SETTINGS, **FLAT}, "base": base, "figures": figures, "differences": differences(figures)},
    )


def evaluator_of(sdxl: Sdxl, heldout: Sequence[Sample], training: Sequence[Sample], work: Path) -> LossEvaluator:
    sets = {
        name: ImageSet(samples, [UNGROUPED] * len(samples), DRAWS)
        for name, samples in {"heldout": heldout, "train": training}.items()
    }
    return LossEvaluator(sdxl, Objective(sdxl.scheduler), sets, sdxl.resolution, work / "measured")


def trained(arm: str, seed: int, args: argparse.Namespace, work: Path) -> dict[int, Path]:
    """The LoRA files of a run by their steps."""
    folder = work / f"{arm}-{seed}-{args.steps}"
    if not (folder / LORA_FILE).is_file():
        more = {"checkpointing_steps": args.every, "resume_from_checkpoint": "latest"}
        train(config_of(args, folder, seed, **SETTINGS, **ARMS[arm], **more))
    between = range(args.every, args.steps, args.every)
    return {**{step: folder / f"checkpoint-{step}" / LORA_FILE for step in between}, args.steps: folder / LORA_FILE}


def config_of(args: argparse.Namespace, folder: Path, seed: int, **settings: Any) -> TrainConfig:
    """A run like the demo's on the command's base and icons, with more settings."""
    return (
        TrainConfig()
        .updated_from(preset_file("demo"))
        .replace(
            pretrained_model_name_or_path=args.base,
            instance_data_dir=str(args.data),
            output_dir=str(folder),
            max_train_steps=args.steps,
            seed=seed,
            **settings,
        )
    )


def measured(
    evaluator: LossEvaluator, file: Path, risen: str = "heldout", draws: int = RISE_DRAWS
) -> dict[str, float]:
    """A file's losses, and the mean rise of those of the set `risen`."""
    losses = {name: values[UNGROUPED] for name, values in evaluator.losses(file).items()}
    rises = evaluator.rises(file, risen, RISE, draws)
    return {**losses, "rise": sum(rises) / len(rises)}


def differences(figures: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """By step, pair of arms and metric."""
    return {
        step: {
            f"{one} - {other}": {
                metric: asdict(
                    paired_difference([row[metric] for row in arms[one]], [row[metric] for row in arms[other]])
                )
                for metric in ("heldout", "train", "rise")
            }
            for one, other in PAIRS
        }
        for step, arms in figures.items()
    }


def table(figures: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    lines = ["| steps | arms | held-out, 1e-5 | clean train, 1e-5 | rise, 1e-5 |", "|---|---|---|---|---|"]
    for step, pairs in differences(figures).items():
        for pair, metrics in pairs.items():
            cells = [in_words(metrics[metric]) for metric in ("heldout", "train", "rise")]
            lines.append(f"| {step} | {pair} | {' | '.join(cells)} |")
    return "\n".join(lines)


def in_words(difference: dict[str, Any]) -> str:
    mean = f"{1e5 * difference['mean']:+.1f}"
    if difference["low"] is None:
        return mean
    return f"{mean} [{1e5 * difference['low']:+.1f}, {1e5 * difference['high']:+.1f}]"


if __name__ == "__main__":
    main()
