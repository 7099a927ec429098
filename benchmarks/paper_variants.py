"""Where does flatness pay? Strong and early noise on the tiny base, against rivals and simpler controls.

    python -m benchmarks.paper_variants --work FOLDER --parts map draws tuned methods

map       sigma and schedule of eps, a checkpoint every 50 steps; the best cells again with seeds of their own
draws     Eq. 7 against iid noise, thin against full draws, one eps for a batch against one for each example
controls  what is simpler: half the rate, weight decay, dropout, L2 on the change, noise in the input, EMA, stopping
tuned     LoRA and Flat-LoRA with equal trials, then fresh seeds
sizes     the two so tuned at other ranks, numbers of images and of steps
methods   every rival method, each with three trials of its strength, with seconds and memory of a step
sam       SAM over W, which `methods` found best, at larger radii, with fresh seeds, beside LoRA of as many gradients
forgetting the same LoRAs at other strengths, compared where both forget as much
adapters  every rival adapter and optimizer, each with three trials of its learning rate, plain and flat; the same
preset    SAM and LoRA with the settings of `--preset quality`
felt      the same LoRAs on a base of fewer bits or another checkpoint, at other strengths, with a second LoRA
again     what `felt` found, with fresh seeds and beside two simpler means
domain    another set of icons as the style

The other checkpoint is `--other_base`: such as the tiny base as it was first trained, which `git worktree add OTHER
079531f` puts into OTHER/samples/tiny_sdxl.

Settings, cells and checkpoints are chosen on the icons `search`, what is published was measured on `report`; the lists
share no icon. First it prints how long it will take: about 11 core-hours where 300 steps of Flat-LoRA take a minute of
a core. Nothing is trained or measured twice: the same command goes on after a stop. Each part writes
benchmarks/paper_variants_PART.json, of which `python -m benchmarks.paper_variants_page` makes docs/variants.md. Needs
npm and the `recipe` extra for the icons, and Optuna for `tuned` and `sizes`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.paper_variants_parts import PARTS
from benchmarks.paper_variants_study import Study
from benchmarks.paper_variants_tuned import NEED_OPTUNA, check_optuna
from flatlora_diffusion.config import TINY

FOLDER = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if NEED_OPTUNA & set(options.parts):
        check_optuna()
    logging.disable(logging.WARNING)  # of every file that is loaded the same
    torch.set_num_threads(options.threads)
    study = Study(options)
    study.say_estimate()
    for part in options.parts:
        result = study.shared(part) | PARTS[part](study)
        for row in result["rows"]:
            row.pop("points", None)  # which the work folder keeps
        record.save(options.out / f"paper_variants_{part}.json", result)
        print(f"{part}: written; `python -m benchmarks.paper_variants_page` makes the page", flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--work", type=Path, required=True, help="folder for icons, runs and measurements; kept")
    found.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    found.add_argument("--icons", type=Path, help="folder for the npm packages; default: that of --work")
    found.add_argument("--base", default=TINY)
    found.add_argument("--other_base", type=Path, help="another checkpoint of it, a folder, for `felt`")
    found.add_argument("--learning_rate", type=float, default=5e-4, help="of all arms that do not choose one")
    found.add_argument("--steps", type=int, default=300)
    found.add_argument("--seeds", type=int, default=5, help="of each arm that is reported")
    found.add_argument("--map_seeds", type=int, default=1, help="of each cell of the map, to choose by")
    found.add_argument("--trials", type=int, default=20, help="of LoRA, and as many of Flat-LoRA")
    found.add_argument("--fresh", type=int, default=10, help="seeds of the two tuned arms")
    found.add_argument("--at_most", type=int, help="measure so many icons of each list, to try the command out")
    found.add_argument("--workers", type=int, help="train so many runs at once, in processes of their own")
    found.add_argument("--cluster", help="train on a Ray cluster: its address, or local for one on this machine")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--out", type=Path, default=FOLDER, help="folder for the results")
    return found


if __name__ == "__main__":
    main()
