"""What does each way to perturb W cost a layer, and how far is that from its floor? `python -m benchmarks.layer_cost`

A stack of linear layers of one shape, forward and backward, with a LoRA of rank 16. `in place` is the algorithm of the
paper's code: form W', draw eps and add it to W, run both passes, draw it again and subtract it. The arms take turns as
in `benchmarks/train_step.py`. First the shapes of the tiny base and of SDXL, then one property at a time of 4 layers
of 640 x 640 with 1,024 tokens.


The floor of what an arm adds to LoRA is what it cannot do without: the numbers that it draws over this machine's rate
of draws, plus the bytes of W and eps that it moves over the rate of copying. Drift is |W - W_0| / |W_0| after 500
steps in bf16. Writes benchmarks/layer_cost.json.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks import record
from benchmarks.turns import Step, compare
from flatlora_diffusion import FlatLora
from flatlora_diffusion.config import DrawKind
from flatlora_diffusion.method.draw import DRAW_RANK

SIGMA, DRIFT_STEPS = 0.1, 500
Arm = Literal["lora", "in place", "full", "low-rank"]
ARMS: tuple[Arm, ...] = ("lora", "in place", "full", "low-rank")
DRAWS: dict[Arm, DrawKind] = {"full": "full", "low-rank": "low_rank"}


@dataclass(frozen=True)
class Stack:
    """`layers` linear layers of `rows` x `inputs`, each given its own (batch, tokens, inputs)."""

    rows: int = 640
    inputs: int = 640
    tokens: int = 1024
    batch: int = 1
    layers: int = 4
    rank: int = 16


SHAPES = {
    "tiny base, 160 x 160, 64 tokens, batch 4": Stack(160, 160, 64, 4, 36),
    "SDXL, 640 x 640, 4,096 tokens": Stack(640, 640, 4096, layers=2),
    "SDXL, 1280 x 1280, 1,024 tokens": Stack(1280, 1280, 1024),
    "SDXL, 1280 x 2048, 77 tokens": Stack(1280, 2048, 77),
}
SCALING: dict[str, tuple[int, ...]] = {
    "rank": (4, 16, 64),
    "width": (320, 640, 1280),
    "tokens": (256, 1024, 4096),
    "layers": (2, 8, 32),
    "batch": (1, 2, 4),
}
SMALL = Stack(24, 16, 8, 2, 3, 2)  # `--small`: shows that it runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8, help="time to spend on each stack")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="one tiny stack of each kind, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rates = record.rates()
    result: dict[str, Any] = {"rates": rates, "shapes": {}, "scaling": {}}
    for name, stack in ({"small": SMALL} if args.small else SHAPES).items():
        result["shapes"][name] = measured(stack, args.seconds, rates)
        result["shapes"][name]["drift"] = {arm: drift(stack, arm, 5 if args.small else DRIFT_STEPS) for arm in ARMS}
        report(name, result["shapes"][name])
    for what, values in ({"layers": (2,)} if args.small else SCALING).items():
        result["scaling"][what] = {}
        for value in values:
            changes = {"rows": value, "inputs": value} if what == "width" else {what: value}
            stack = replace(SMALL if args.small else Stack(), **changes)
            result["scaling"][what][f"{value}"] = measured(stack, args.seconds, rates)
            report(f"{what} {value}", result["scaling"][what][f"{value}"])
    record.save(args.out, result)


def measured(stack: Stack, seconds: float, rates: dict[str, float]) -> dict[str, Any]:
    """Seconds and ratios to LoRA of each arm, and what it adds to LoRA against its floor."""
    found = compare({arm: step_of(stack, arm) for arm in ARMS}, seconds)
    plain = found["seconds"]["lora"][1]
    floors = {arm: floor(stack, arm, rates) for arm in ARMS if arm != "lora"}
    added = {arm: plain * (found[f"{arm} / lora"][1] - 1) for arm in floors}
    return {"stack": asdict(stack), **found, "floor": floors, "added": added}


def model_of(stack: Stack, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(*[nn.Linear(stack.inputs, stack.rows, dtype=dtype) for _ in range(stack.layers)])
        targets = [f"{index}" for index in range(stack.layers)]
        config = LoraConfig(r=stack.rank, lora_alpha=stack.rank, target_modules=targets, init_lora_weights=False)
        return get_peft_model(layers, config).to(record.DEVICE)


def step_of(stack: Stack, arm: Arm) -> Step:
    model = model_of(stack)
    layers = lora_layers(model)
    shape = (stack.batch, stack.tokens, stack.inputs)
    inputs = [torch.ones(shape, device=record.DEVICE, requires_grad=True) for _ in layers]
    perturb = perturbation(model, arm)

    def step(index: int) -> float:
        with perturb(index):
            for layer, x in zip(layers, inputs, strict=True):
                x.grad = None
                layer(x).sum().backward()
        model.zero_grad(set_to_none=True)
        return 0.0

    return step


def perturbation(model: nn.Module, arm: Arm) -> Any:
    """What opens the perturbation of a step."""
    if arm == "lora":
        return lambda step: nullcontext()
    if arm == "in place":
        return lambda step: InPlace(lora_layers(model), step)
    return FlatLora(model, sigma=SIGMA, schedule="constant", draw=DRAWS[arm]).perturb


class InPlace:
    """W + eps is written into W, and eps taken off again: the paper's code, with a generator of its own."""

    def __init__(self, layers: list[Any], step: int) -> None:
        self._layers, self._step = layers, step

    @torch.no_grad()
    def __enter__(self) -> None:
        self._stds = []
        for layer in self._layers:
            merged = layer.get_base_layer().weight + layer.get_delta_weight("default")
            self._stds.append(merged.norm(dim=1, keepdim=True) * SIGMA / merged.shape[1] ** 0.5)
        self._add(1)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        self._add(-1)

    def _add(self, sign: int) -> None:
        rng = torch.Generator(record.DEVICE).manual_seed(self._step)
        for layer, std in zip(self._layers, self._stds, strict=True):
            weight = layer.get_base_layer().weight
            eps = torch.empty_like(weight).normal_(generator=rng)
            weight.add_(eps.mul_(std), alpha=sign)


def floor(stack: Stack, arm: Arm, rates: dict[str, float]) -> float:
    """Seconds that an arm cannot add less than to a step in fp32."""
    weights = stack.rows * stack.inputs
    if arm == "low-rank":  # its norms read W once
        draws, moved = DRAW_RANK * (stack.rows + stack.inputs), 4 * weights
    elif arm == "full":  # the same, and in both passes W is read and W + eps is written and read
        draws, moved = 2 * weights, 4 * weights * (1 + 2 * 3)
    else:  # W' is written and read for its norms; eps is written, read, and W with it read and written, twice
        draws, moved = 2 * weights, 4 * weights * (3 + 2 * 4)
    return stack.layers * (draws / rates["draws"] + moved / rates["bytes"])


def drift(stack: Stack, arm: Arm, steps: int) -> float:
    """How far W has moved after `steps` perturbations in bf16, as a share of its norm."""
    model = model_of(replace(stack, layers=1), torch.bfloat16)
    (layer,) = lora_layers(model)
    weight: Tensor = layer.get_base_layer().weight
    before = weight.detach().clone()
    perturb = perturbation(model, arm)
    for step in range(steps):
        with perturb(step):
            pass
    return float((weight.detach() - before).float().norm() / before.float().norm())


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "get_delta_weight")]


def report(name: str, found: dict[str, Any]) -> None:
    print(f"\n{name}\n\n| arm | ms | / LoRA | added, ms | its floor, ms | peak MiB | drift |")
    print("|---|---|---|---|---|---|---|")
    for arm in ARMS:
        cells = [f"{1e3 * found['seconds'][arm][1]:.2f}"]
        if arm == "lora":
            cells += ["", "", ""]
        else:
            cells += [f"{found[f'{arm} / lora'][1]:.3f}"]
            cells += [f"{1e3 * found[what][arm]:.2f}" for what in ("added", "floor")]
        drifted = f"{found['drift'][arm]:.1e}" if "drift" in found else ""
        print(f"| {arm} | {' | '.join(cells)} | {found['peak_bytes'][arm] / 2**20:.1f} | {drifted} |", flush=True)


if __name__ == "__main__":
    main()
