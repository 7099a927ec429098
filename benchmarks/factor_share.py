"""What of a perturbation of A and B arrives in W, and where? `python -m benchmarks.factor_share`

The tiny base and the 3D icons, a LoRA of rank 4 at the demo's learning rate, trained by each method that perturbs. At
some steps the perturbation that the step's gradient is taken at is read off the factors of all layers,

    eps_W = s (B eps_A + eps_B A + eps_B eps_A)

Of its length, the share that s eps_B A alone has, which dominates as the paper has it (arXiv:2409.14396, Eq. 4; over
0.95 for LoRA-SAM on MRPC); of its energy, the share that lies in the rows of A. Flat-LoRA's eps is measured beside
them. Prints a table and writes benchmarks/factor_share.json; about a minute on one core.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers
from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.ground.provenance import DrawHash
from flatlora_diffusion.training.micro_batches import DrawnMicroBatch, micro_batches
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

METHODS = ("lora-sam", "factor-noise", "flat-lora")
AT = (0, 1, 3, 10, 30, 100)  # steps that are done by then
SETTINGS: dict[str, Any] = {
    "instance_data_dir": str(SAMPLES / "icons_3d"),
    "rank": 4,
    "train_batch_size": 4,
    "learning_rate": 1e-3,
    "lr_scheduler": "constant",
    "sigma_schedule": "constant",
    "cache_latents": True,
    "report_to": "none",
    "seed": 0,
}

Shares = dict[str, float | None]


@dataclass(frozen=True)
class Factors:
    """A (r, n) and B (m, r) of a layer with its s, as they are in one pass."""

    down: Tensor
    up: Tensor
    scale: float


@dataclass
class Watched:
    """A micro-batch that notes the factors of each pass."""

    batch: DrawnMicroBatch
    passes: list[dict[str, Factors]] = field(default_factory=list)

    @property
    def slot(self) -> int:
        return self.batch.slot

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        self.passes.append(factors(self.batch.state))
        return self.batch.backward(weight, is_shared)


def main(argv: Sequence[str] | None = None, settings: Mapping[str, Any] = SETTINGS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at", type=int, nargs="+", default=AT, help="steps after which to measure, rising")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = {method: measured(method, args.at, settings) for method in METHODS}
    print(table(found))
    kept = {name: value for name, value in settings.items() if not name.endswith("_dir")}
    record.save(args.out, {"settings": kept, "shares": found})


def measured(method: str, at: Sequence[int], settings: Mapping[str, Any]) -> dict[str, Shares]:
    """The shares of a training's perturbations by the number of steps that are done."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig.from_dict(
            {**settings, "method": method, "max_train_steps": max(at) + 1, "output_dir": folder}
        )
        state = prepare(config, load_samples(Path(str(config.data.instance_data_dir))).samples)
        for step in range(max(at) + 1):
            if step in at:
                found[str(step)] = of_weights(state, step) if state.flats else of_factors(state, step)
            if step < max(at):
                train_step(state, step)
    return found


def of_factors(state: TrainState, step: int) -> Shares:
    """Those of what the gradient of `step` is taken at; nothing is trained."""
    clean = factors(state)
    watched = [Watched(one) for one in micro_batches(state, step, DrawHash())]
    state.gradient.take(step, watched)
    state.optimizer.zero_grad(set_to_none=True)
    return shares(clean, watched[0].passes[-1])


def shares(clean: Mapping[str, Factors], moved: Mapping[str, Factors]) -> Shares:
    """Over all layers: ||s eps_B A|| / ||eps_W||, and of ||eps_W||^2 the part in the rows of A; None if eps_W is 0."""
    whole = dominant = inside = 0.0
    for name, old in clean.items():
        new = moved[name]
        eps = old.scale * (new.up @ new.down - old.up @ old.down)
        whole += float(eps.square().sum())
        dominant += float((old.scale * (new.up - old.up) @ old.down).square().sum())
        inside += in_rows(eps, old.down)
    if whole == 0:
        return {"eps_B A": None, "rows of A": None}
    return {"eps_B A": (dominant / whole) ** 0.5, "rows of A": inside / whole}


def of_weights(state: TrainState, step: int) -> Shares:
    """That of Flat-LoRA's eps."""
    whole = inside = 0.0
    for name, own in factors(state).items():
        eps = state.flats[0].noise(name, step).flatten(1).double()
        whole += float(eps.square().sum())
        inside += in_rows(eps, own.down)
    return {"eps_B A": None, "rows of A": inside / whole}


def in_rows(eps: Tensor, down: Tensor) -> float:
    """The part of ||eps||^2, eps (m, n), in the span of the rows of `down` (r, n)."""
    return float((eps @ torch.linalg.qr(down.mT).Q).square().sum())


def factors(state: TrainState) -> dict[str, Factors]:
    """Of each layer in float64: small differences of them are taken."""
    return {
        name: Factors(
            layer.lora_A[ADAPTER].weight.detach().flatten(1).double(),
            layer.lora_B[ADAPTER].weight.detach().flatten(1).double(),
            layer.scaling[ADAPTER],
        )
        for name, layer in lora_layers(state.sdxl.unet).items()
    }


def table(found: Mapping[str, Mapping[str, Shares]]) -> str:
    steps = list(next(iter(found.values())))
    lines = [f"{'after steps':<26}" + "".join(f"{step:>8}" for step in steps)]
    for method, by_step in found.items():
        for share in ("eps_B A", "rows of A"):
            values = [by_step[step][share] for step in steps]
            if any(value is not None for value in values):
                cells = "".join(f"{'':>8}" if value is None else f"{value:>8.3f}" for value in values)
                lines.append(f"{method + ', ' + share:<26}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
