"""Does an eps for each example make the gradient less noisy? `python -m benchmarks.example_draws`

The tiny base and the 3D icons in batches of 4, with a LoRA of rank 16 that has been trained for some steps and then
stays as it is. For one batch, with its noise and timesteps, the gradient is taken at many draws of eps, one for the
batch or one for each example; its variance over them is the sum of that of all entries. What the batch itself adds,
with new images, noise and timesteps for each and no eps, tells how much of a step's variance eps can be blamed for.
Writes benchmarks/example_draws.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.train_step import RANK
from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.ground.seeds import generator
from flatlora_diffusion.sdxl.objective import diffusion_loss, draw_targets
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

BATCH, STEPS = 4, 20
SIGMAS = (0.1, 0.4)
ARMS = {"one for the batch": False, "one for each example": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=60, help="of eps in each arm, and of batches")
    parser.add_argument("--batches", type=int, default=2, help="batches whose variance over eps is averaged")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        state = trained(folder)
    of_batches = variance(args.draws, lambda draw: gradient(state, draw))
    result: dict[str, Any] = {"batch": BATCH, "draws": args.draws, "batches": args.batches, "of_batches": of_batches}
    print(f"the batch alone: {of_batches:.3e}")
    for sigma in SIGMAS:
        found = {arm: of_eps(state, sigma, is_own, args) for arm, is_own in ARMS.items()}
        whole, own = found.values()
        result.setdefault("of_eps", {})[f"{sigma:g}"] = found
        print(
            f"sigma {sigma:g}: one eps for the batch {whole:.3e}, one for each example {own:.3e}, ratio "
            f"{own / whole:.3f}; of the step's variance {whole / (whole + of_batches):.2%} and "
            f"{own / (own + of_batches):.2%}"
        )
    record.save(args.out, result)


def trained(folder: str) -> TrainState:
    data = SAMPLES / "icons_3d"
    settings = {"rank": RANK, "learning_rate": 5e-4, "lr_scheduler": "constant", "cache_latents": True}
    run = {"output_dir": folder, "report_to": "none", "seed": 0, "max_train_steps": 10_000}
    config = TrainConfig.from_dict(
        {"method": "lora", "instance_data_dir": str(data), "train_batch_size": BATCH, **settings, **run}
    )
    state = prepare(config, load_samples(data).samples)
    for step in range(STEPS):
        train_step(state, step)
    return state


def of_eps(state: TrainState, sigma: float, is_own: bool, args: argparse.Namespace) -> float:
    """The variance over eps, the mean of that at several batches."""
    flat = FlatLora(state.model, sigma=sigma, schedule="constant", draw="low_rank", per_example=is_own)
    try:
        each = [
            variance(args.draws // args.batches, partial(gradient, state, batch, flat))
            for batch in range(args.batches)
        ]
    finally:
        flat.detach()
    return sum(each) / len(each)


def variance(draws: int, at: Callable[..., Tensor]) -> float:
    """The sum of all entries' variances over so many draws."""
    total, squares = torch.zeros(()), 0.0
    for draw in range(draws):
        found = at(draw).double()
        total = total + found
        squares += float(found.square().sum())
    return (squares - float(total.square().sum()) / draws) / (draws - 1)


def gradient(state: TrainState, batch_of: int, flat: FlatLora | None = None, draw: int = 0) -> Tensor:
    """All trained weights' gradient, for the batch of a step that is still to come."""
    step = STEPS + batch_of
    batch = state.batches.batch(step, 0)
    noise, timesteps = draw_targets(
        state.objective, batch.latents, generator(batch.latents.device, 0, "diffusion", step, 0)
    )
    with nullcontext() if flat is None else flat.perturb(step, draw):
        diffusion_loss(state.model, state.objective, batch, noise, timesteps).backward()
    found = torch.cat(
        [parameter.grad.flatten() for parameter in state.trainable.values() if parameter.grad is not None]
    )
    state.optimizer.zero_grad(set_to_none=True)
    return found


if __name__ == "__main__":
    main()
