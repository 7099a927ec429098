"""Which rho does `--rho_rise` find? `python -m benchmarks.rho_rise --packages PACKAGES --work FOLDER`

On the tiny base at the settings of `paper_variants`, with a larger batch, and with the layers of the demo; and, by the
same formula, for the texts of `paper_language`. Five seeds each, which say how much the first 16 images, or batches,
leave to chance. Writes benchmarks/rho_rise.json; about a minute. The folders are those of `paper_language`.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.paper_language import TextBench, load_task, model_folder
from benchmarks.paper_study_run import first_slopes
from benchmarks.paper_study_settings import Settings
from benchmarks.paper_text_to_image import SETTINGS
from flatlora_diffusion.compare.material import SAMPLE_ICONS
from flatlora_diffusion.config import TrainConfig, preset_file
from flatlora_diffusion.config.methods import IN_FORCE
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.training.beginning.first_weights import first_weights
from flatlora_diffusion.training.state import prepare

RISE = IN_FORCE["rho_rise"]["sam"]
SEEDS = range(5)
TASK = "emoji_group"  # on which paper_language sweeps rho
BATCHES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the npm and pip packages")
    parser.add_argument("--work", type=Path, required=True, help="folder for the tasks")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    study = TrainConfig.from_dict({**SETTINGS, "instance_data_dir": str(SAMPLE_ICONS), "method": "sam"})
    demo = TrainConfig().updated_from(preset_file("demo")).replace(method="sam", report_to="none")
    rhos = {
        "attention, batch 2": [of_images(study, seed) for seed in SEEDS],
        "attention, batch 8": [of_images(study.replace(train_batch_size=8), seed) for seed in SEEDS],
        "the demo's layers, batch 4": [of_images(demo, seed) for seed in SEEDS],
    }
    bench = TextBench(load_task(TASK, options.packages, options.work / "tasks"), model_folder(options.packages))
    rhos[TASK] = [of_texts(bench, seed) for seed in SEEDS]
    record.save(Path(__file__).with_suffix(".json"), {"rise": RISE, "rhos": rhos})
    for name, found in rhos.items():
        print(f"{name}: rho {', '.join(f'{rho:.3g}' for rho in found)}")


def of_images(config: TrainConfig, seed: int) -> float:
    """What a run finds before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(seed=seed, output_dir=folder)
        state = prepare(config, load_samples(Path(str(config.data.instance_data_dir))).samples)
        first_weights(state)
    assert state.config.perturb.rho is not None
    return state.config.perturb.rho


def of_texts(bench: TextBench, seed: int) -> float:
    """rise * E[L] / E[||g||] of the first batches."""
    found = first_slopes(bench, Settings(lr=1, steps=BATCHES), seed, BATCHES)
    return RISE * math.fsum(loss for loss, _ in found) / math.fsum(slope for _, slope in found)


if __name__ == "__main__":
    main()
