"""Table 7: what does each method cost a step of a language model? `python -m benchmarks.paper_memory`

A Llama of 3.5 million random parameters with a LoRA of rank 8 on its linear layers, forward, backward and AdamW's
step; the arms take turns as in `benchmarks/train_step.py`. `in place` is the algorithm of the paper's code (see
`benchmarks/layer_cost.py`), `sam` is SAM over W. Peak is the most that a step holds beyond what was there before it,
kept is what a method holds between steps beside the weights. Drift is |W - W_0| / |W_0| over all adapted layers after
50 steps in bf16. Writes benchmarks/paper_memory.json.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record
from benchmarks.layer_cost import SIGMA, InPlace, lora_layers
from benchmarks.turns import compare
from flatlora_diffusion import FlatLora
from flatlora_diffusion.method.rivals.ascent import Sam
from flatlora_diffusion.method.step_gradient import StepGradient

ARMS = ("lora", "full", "low-rank", "in place", "sam")
TITLES = {
    "lora": "LoRA",
    "full": "Flat-LoRA, full draw",
    "low-rank": "Flat-LoRA, low-rank draw",
    "in place": "in place, as the paper's code",
    "sam": "SAM over W",
}
RHO, DRIFT_STEPS = 0.05, 50


@dataclass(frozen=True)
class Sizes:
    """Of the model, and of a batch of texts."""

    width: int = 256
    inner: int = 704
    layers: int = 4
    words: int = 512
    batch: int = 4
    tokens: int = 128


SMALL = Sizes(16, 24, 1, 32, 2, 8)  # `--small`: shows that it runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="time to spend on the steps that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measured(SMALL if options.small else Sizes(), options.seconds, 3 if options.small else DRIFT_STEPS)
    print(table(found))
    record.save(options.out, found)


def measured(sizes: Sizes, seconds: float, drift_steps: int) -> dict[str, Any]:
    """Seconds, ratios to LoRA, memory and drift of each arm."""
    arms = {arm: Trained(sizes, arm) for arm in ARMS}
    found = compare({arm: trained.step for arm, trained in arms.items()}, seconds)
    return {
        "sizes": asdict(sizes),
        **found,
        "kept_bytes": {arm: trained.kept_bytes for arm, trained in arms.items()},
        "drift": {arm: drift(sizes, arm, drift_steps) for arm in ARMS},
    }


class Trained:
    """A model that is trained by one arm's method."""

    slot = 0  # of the only micro-batch, which this is too

    def __init__(self, sizes: Sizes, arm: str, dtype: torch.dtype = torch.float32) -> None:
        self.model, self._arm = model_of(sizes, dtype), arm
        self._ids = torch.arange(sizes.batch * sizes.tokens, device=record.DEVICE).view(sizes.batch, -1) % sizes.words
        self._parameters = [one for one in self.model.parameters() if one.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=1e-4)
        self._flat: FlatLora | None = None
        self._gradient = StepGradient()
        if arm in ("full", "low-rank"):
            draw = "full" if arm == "full" else "low_rank"
            self._flat = FlatLora(self.model, SIGMA, "constant", draw=draw)  # type: ignore[arg-type]
        elif arm == "sam":
            self._gradient = Sam([self.model], self._parameters, RHO)

    @property
    def kept_bytes(self) -> int:
        return 0 if self._flat is None else self._flat.state_bytes

    def step(self, index: int) -> float:
        if self._flat is not None:
            with self._flat.perturb(index):
                (loss,) = self._gradient.take(index, [self])
        elif self._arm == "in place":
            with InPlace(lora_layers(self.model), index):
                (loss,) = self._gradient.take(index, [self])
        else:
            (loss,) = self._gradient.take(index, [self])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        loss: Tensor = self.model(input_ids=self._ids, labels=self._ids).loss
        (weight * loss).backward()
        return loss.detach()


def model_of(sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    config = LlamaConfig(
        vocab_size=sizes.words,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        max_position_embeddings=sizes.tokens,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(LlamaForCausalLM(config), lora).to(record.DEVICE, dtype)


def drift(sizes: Sizes, arm: str, steps: int) -> float:
    """How far all W have moved together after `steps` in bf16, as a share of their norm."""
    trained = Trained(sizes, arm, torch.bfloat16)
    weights = [layer.get_base_layer().weight for layer in lora_layers(trained.model)]
    before = [weight.detach().clone() for weight in weights]
    for step in range(steps):
        trained.step(step)
    moved = sum((now - then).float().square().sum() for now, then in zip(weights, before, strict=True))
    whole = sum(then.float().square().sum() for then in before)
    return float((moved / whole) ** 0.5)


def table(found: dict[str, Any]) -> str:
    lines = ["| method | ms a step | / LoRA | peak MiB | kept KiB | drift of W |", "|---|---|---|---|---|---|"]
    for arm in ARMS:
        ratio = "1" if arm == "lora" else f"{found[f'{arm} / lora'][1]:.2f}"
        cells = [TITLES[arm], f"{1e3 * found['seconds'][arm][1]:.1f}", ratio]
        cells += [f"{found['peak_bytes'][arm] / 2**20:.1f}", f"{found['kept_bytes'][arm] / 2**10:.0f}"]
        cells += [f"{found['drift'][arm]:.1e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
