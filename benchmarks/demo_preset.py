"""Which learning rate, rank and steps should `make demo` have? `python -m benchmarks.demo_preset --work FOLDER`

Trains plain LoRAs of the demo's settings around (learning rate 1e-3, rank 8) and measures the held-out 3D denoising
loss every 50 steps: chosen on the LoRA arm alone, so that the demo does not favour Flat-LoRA. Finished runs are not
trained again. Prints a table and writes benchmarks/demo_preset.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from flatlora_diffusion.compare.evaluator import HELDOUT
from flatlora_diffusion.compare.losses import UNGROUPED, LossEvaluator
from flatlora_diffusion.compare.material import SAMPLE_ICONS, read_material
from flatlora_diffusion.config import CompareConfig, ModelConfig, TrainConfig, preset_file
from flatlora_diffusion.lora_files.diffusers_file import LORA_FILE
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.pipeline import load_sdxl
from flatlora_diffusion.training.trainer import train

STEPS, EVERY = 400, 50
TRIALS = ((1e-3, 8), (5e-4, 8), (2e-3, 8), (1e-3, 4), (1e-3, 16))  # learning rate, rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    demo = TrainConfig().updated_from(preset_file("demo")).replace(method="lora", instance_data_dir=str(SAMPLE_ICONS))
    sdxl = load_sdxl(ModelConfig(), torch.device("cpu"), torch.float32)
    heldout = {HELDOUT: read_material(demo, CompareConfig()).sets[HELDOUT]}
    evaluator = LossEvaluator(sdxl, Objective(sdxl.scheduler), heldout, sdxl.resolution, args.work / "measured")

    def loss(lora: Path | None) -> float:
        return evaluator.losses(lora)[HELDOUT][UNGROUPED]

    found: dict[str, dict[int, float]] = {}
    for rate, rank in TRIALS:
        folder = args.work / f"rate-{rate:g}-rank-{rank}"
        config = demo.replace(learning_rate=rate, rank=rank, output_dir=str(folder), checkpointing_steps=EVERY)
        if not (folder / LORA_FILE).is_file():
            train(config.replace(max_train_steps=STEPS))
        files = {step: folder / f"checkpoint-{step}" / LORA_FILE for step in range(EVERY, STEPS, EVERY)}
        found[folder.name] = {step: loss(file) for step, file in {**files, STEPS: folder / LORA_FILE}.items()}
    report(loss(None), found)


def report(base: float, found: dict[str, dict[int, float]]) -> None:
    steps = next(iter(found.values()))
    print(f"Held-out 3D denoising loss; the base's is {base:.5f}\n")
    print(f"| run | {' | '.join(map(str, steps))} |\n|---{'|---' * len(steps)}|")
    for name, losses in found.items():
        print(f"| {name} | {' | '.join(f'{value:.5f}' for value in losses.values())} |")
    result = {"base": base, "heldout_loss_by_step": found}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
