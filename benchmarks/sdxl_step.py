"""Where does the time of a whole SDXL step go? `python -m benchmarks.sdxl_step`

A UNet of SDXL's sizes with random weights in bf16 (2.6 billion, 5 GB), 512 pixels, batch 1, gradient checkpointing, a
LoRA of rank 16 under autocast to bf16: our `train_step` with plain LoRA, with full and with low-rank draws.

First a step of each is profiled, after one for the memory: what an operator takes by itself counts for the innermost
part that it runs in. A product with a dimension of the LoRA's rank, or of that and the draw's, is the LoRA's branch,
in forward and backward alike. Then the arms take turns as in `benchmarks/train_step.py`; on a CPU the seconds are
those of the process, so that a busy machine tells the same. Writes benchmarks/sdxl_step.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import record
from benchmarks.random_sdxl import SDXL
from benchmarks.train_step import RANK, noise_schedule, our_step, report, state_of
from benchmarks.turns import Step, launches_in, peak_bytes, timed
from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.config import AdapterConfig, ModelConfig
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.sdxl.shapes import on_meta
from flatlora_diffusion.method import noise
from flatlora_diffusion.method.draw import DRAW_RANK, LowRankDraw
from flatlora_diffusion.method.gradient import GradientInputs, step_gradient
from flatlora_diffusion.method.row_norms import RowStdCache
from flatlora_diffusion.training.state import Progress, TrainState

ARMS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "full": {"method": "flat-lora", "perturb_draw": "full"},
    "low-rank": {"method": "flat-lora", "perturb_draw": "low_rank"},
}
PROMPT_TOKENS, TIME_IDS = 77, 6
LORA, REST = "LoRA's branch", "UNet: norms, activations, copies"
# Operators by the beginnings of their names. All products that are not the LoRA's are the UNet's.
KINDS = {
    "UNet: linear layers": ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_linear"),
    "UNet: convolutions": ("aten::mkldnn_convolution", "aten::convolution", "aten::_slow_conv2d"),
    "UNet: attention": ("aten::_scaled_dot_product",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2, help="steps of each arm that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--base", default=SDXL.pretrained_model_name_or_path, help="whose sizes the UNet has")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subject = f"whole UNet, {args.resolution} px, batch 1, bf16, checkpointing"
    with tempfile.TemporaryDirectory() as folder:
        found = measured(plain_state(args.base, args.resolution, folder), args.turns)
    report(subject, found)
    record.save(args.out, {subject: found})


def measured(plain: TrainState, turns: int) -> dict[str, Any]:
    """What `benchmarks.turns.compare` gives, and the parts of a step."""
    found: dict[str, Any] = {"turns": turns, "peak_bytes": {}, "launches": {}, "parts": {}}
    with training(plain, "lora") as step:  # the optimizer makes its state in the first step
        step(0)
    for arm in ARMS:
        with training(plain, arm) as step:
            found["peak_bytes"][arm] = peak_bytes(step, 0)
            found["parts"][arm], found["launches"][arm] = profiled(step, 1)
        shares = ", ".join(f"{part} {share:.1%}" for part, share in found["parts"][arm].items())
        print(f"{arm}: {shares}", flush=True)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for turn in range(2, turns + 2):
        for arm in ARMS:
            with training(plain, arm) as step:
                seconds[arm].append(busy(step, turn))
            print(f"step {turn}, {arm}: {seconds[arm][-1]:.1f} s", flush=True)
    found["seconds"] = {arm: quartiles(values) for arm, values in seconds.items()}
    for arm in ARMS:
        if arm != "lora":
            found[f"{arm} / lora"] = quartiles([a / b for a, b in zip(seconds[arm], seconds["lora"], strict=True)])
    adapted = {name.split(".lora_A.")[0] for name in plain.trainable if ".lora_A." in name}
    return {"layers": len(adapted), **found}


@contextmanager
def training(plain: TrainState, arm: str) -> Iterator[Step]:
    """The arm's step. One perturbation can be on a model at a time, so it is put on before and taken off after."""
    config = plain.config.replace(**ARMS[arm])
    gradient = step_gradient(
        GradientInputs({"unet": plain.model}, plain.trainable, config.perturb, 0, total_steps=10_000)
    )
    state = replace(plain, progress=Progress(config, gradient))
    try:
        yield our_step(state)
    finally:
        gradient.detach()


def plain_state(base: str, resolution: int, folder: str) -> TrainState:
    unet = random_unet(ModelConfig(pretrained_model_name_or_path=base))
    add_lora(unet, AdapterConfig(rank=RANK), seed=0)
    unet.enable_gradient_checkpointing()
    unet.train()
    side = resolution // 8
    rng = torch.Generator().manual_seed(0)
    sizes = unet.config
    pooled = sizes.projection_class_embeddings_input_dim - TIME_IDS * sizes.addition_time_embed_dim
    batch = Batch(
        latents=torch.randn(1, 4, side, side, generator=rng),
        prompts={
            "prompt_embeds": torch.randn(1, PROMPT_TOKENS, sizes.cross_attention_dim, generator=rng),
            "pooled_prompt_embeds": torch.randn(1, pooled, generator=rng),
        },
        geometry={
            "add_time_ids": torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]], dtype=torch.float32)
        },
    ).map(lambda tensor: tensor.to(record.DEVICE))
    settings = {**ARMS["lora"], "rank": RANK, "mixed_precision": "bf16"}
    return state_of(unet, settings, noise_schedule(), batch, folder)


def random_unet(base: ModelConfig) -> Any:
    """Its weights are cuts of one random vector, so that they are made in seconds: it computes, and means nothing."""
    unet = on_meta(base, "unet").to(torch.bfloat16).to_empty(device=record.DEVICE)
    drawn = torch.randn(2**22 + 7, generator=torch.Generator().manual_seed(0)).to(record.DEVICE, torch.bfloat16)
    for parameter in unet.parameters():
        if parameter.ndim == 1:
            continue
        for piece in parameter.data.view(-1).split(len(drawn)):
            torch.mul(drawn[: len(piece)], parameter[0].numel() ** -0.5, out=piece)
    for module in unet.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.data.fill_(1)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            bias.data.zero_()
    return unet


def quartiles(values: list[float]) -> list[float]:
    """Of so few values that none is to lie beyond them."""
    return statistics.quantiles(values, n=4, method="inclusive")


def busy(step: Step, index: int) -> float:
    """Seconds that the step keeps the process busy; on a GPU, those that it takes."""
    if record.DEVICE.type == "cuda":
        return timed(step, index)
    started = time.process_time()
    step(index)
    return time.process_time() - started


def profiled(step: Step, index: int) -> tuple[dict[str, float], int]:
    """The share of each part in the time that the step's operators take, by size; and its launches."""
    with labelled(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as found:
        step(index)
    times: Counter[str] = Counter()
    events = found.events()
    for event in events:
        times[part_of(event)] += event.self_cpu_time_total
    whole = sum(times.values())
    return {part: taken / whole for part, taken in times.most_common()}, launches_in(events)


@contextmanager
def labelled() -> Iterator[None]:
    """While open the profiler is told of the calls that are eps's parts."""
    calls: list[tuple[Any, str, str]] = [
        (noise, "_effective_weight", "eps: draws"),
        (LowRankDraw, "__init__", "eps: draws"),
        (RowStdCache, "get", "eps: norms of W'"),
    ]
    with ExitStack() as stack:
        for owner, name, label in calls:
            stack.enter_context(patch.object(owner, name, told(getattr(owner, name), label)))
        yield


def told(call: Any, label: str) -> Any:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return call(*args, **kwargs)

    return recorded


def part_of(event: Any) -> str:
    """The part of the step that an event is of: the innermost that is told of, or by the operator."""
    above = event
    while above is not None:
        if above.name.startswith("eps: "):
            return str(above.name)
        if above.name.startswith("Optimizer."):
            return "optimizer"
        if "_PerturbedLayer" in above.name:
            return "eps: its product with x"
        if above.name.startswith("aten::") and is_thin(above):
            return LORA
        above = above.cpu_parent
    return next((kind for kind, names in KINDS.items() if event.name.startswith(names)), REST)


def is_thin(event: Any) -> bool:
    """Whether an operator works on a matrix of the LoRA's rank, with eps's or without."""
    matrices = [shape for shape in event.input_shapes if len(shape) == 2]
    return any(side in (RANK, RANK + DRAW_RANK) for matrix in matrices for side in matrix)


if __name__ == "__main__":
    main()
