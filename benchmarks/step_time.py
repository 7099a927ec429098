"""How much longer is a Flat-LoRA step than a LoRA step on the tiny base? `python -m benchmarks.step_time`

Both arms train in one process and take turns step by step, so that a noisy machine hits both alike. Prints a table and
writes benchmarks/step_time.json. The figure is the median of the ratios of neighbouring steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import diffusers
import peft
import torch

from flatlora_diffusion.config import SAMPLES, TrainConfig, preset_file
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

WARMUP = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="timed steps of each arm")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", default="tiny", help="the base model")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        arms = {method: arm(method, args.base, folder) for method in ("lora", "flat-lora")}
        seconds: dict[str, list[float]] = {method: [] for method in arms}
        for step in range(WARMUP + args.steps):
            for method, state in arms.items():
                seconds[method].append(timed_step(state, step))
    report({method: values[WARMUP:] for method, values in seconds.items()}, args.threads)


def arm(method: str, base: str, folder: str) -> TrainState:
    """A run of the demo's settings; sigma is constant, so that every timed step is perturbed."""
    config = TrainConfig().updated_from(preset_file("demo"))
    data = str(SAMPLES / "icons_3d")
    config = config.replace(
        method=method,
        sigma_schedule="constant",
        instance_data_dir=data,
        pretrained_model_name_or_path=base,
        output_dir=folder,
    )
    return prepare(config, load_samples(Path(data)).samples)


def timed_step(state: TrainState, step: int) -> float:
    started = time.perf_counter()
    train_step(state, step)
    return time.perf_counter() - started


def report(seconds: dict[str, list[float]], threads: int) -> None:
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    ratios = [flat / plain for plain, flat in zip(seconds["lora"], seconds["flat-lora"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    print("| arm | median s/step |\n|---|---|")
    for method, median in medians.items():
        print(f"| {method} | {median:.4f} |")
    print(f"Flat-LoRA / LoRA: {quartiles[1]:.3f} (quartiles {quartiles[0]:.3f} to {quartiles[2]:.3f})")
    result = {
        "seconds_per_step": medians,
        "ratio": quartiles[1],
        "ratio_quartiles": [quartiles[0], quartiles[2]],
        "steps": len(ratios),
        "threads": threads,
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
