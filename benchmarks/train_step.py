"""Is our LoRA step as fast as diffusers' own, and what does Flat-LoRA add? `python -m benchmarks.train_step`

Three arms: `plain` is the training step of diffusers' script written with the same libraries and none of our code,
`lora` and `flat-lora` are our `train_step`. Two subjects: the tiny base, with cached latents and batches of 4, and one
transformer block of SDXL (1280 wide, 1,024 tokens, cross-attention to 77 tokens of 2048). The arms take turns step by
step in one process, so that a noisy machine hits all alike, and each goes first in turn. The figures are medians of
the ratios within a turn. Peak memory is what one step allocates beyond what is there between steps: PyTorch's
allocator as its profiler sees it, on CUDA as the allocator counts it. Writes benchmarks/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import accelerate
import diffusers
import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.optimization import get_scheduler
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.data.batches import Feed
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.ground.run_dir import RunDir
from flatlora_diffusion.method.perturbation import FlatLora
from flatlora_diffusion.sdxl.loading import base_path
from flatlora_diffusion.sdxl.objective import Batch, Objective
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

WARMUP = 3
RANK = 16
WIDTH, SIDE, PROMPT_TOKENS, PROMPT_WIDTH = 1280, 32, 77, 2048
LORA = LoraConfig(
    r=RANK,
    lora_alpha=RANK,
    init_lora_weights="gaussian",
    target_modules=["to_q", "to_k", "to_v", "to_out.0"],
)

Step = Callable[[int], float]  # does optimizer step i and returns its loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50, help="time to spend on each subject")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for subject, make_arms in (("tiny base", tiny_base_arms), ("SDXL block", block_arms)):
            results[subject] = compare(make_arms(folder), args.seconds)
            report(subject, results[subject])
    save(results, args.threads)


def tiny_base_arms(folder: str) -> dict[str, Step]:
    """The three arms on the base that ships with us, as its users train it, the latents encoded before."""
    data = SAMPLES / "icons_3d"
    config = TrainConfig.from_dict(
        {
            "instance_data_dir": str(data),
            "output_dir": folder,
            "rank": RANK,
            "train_batch_size": 4,
            "cache_latents": True,
            "sigma_schedule": "constant",  # so that every timed step is perturbed
            "lr_scheduler": "constant",
            "max_train_steps": 10_000,
            "report_to": "none",
            "seed": 0,
        }
    )
    samples = load_samples(data).samples
    states = {method: prepare(config.replace(method=method), samples) for method in ("lora", "flat-lora")}
    unet = UNet2DConditionModel.from_pretrained(base_path("tiny"), subfolder="unet", dtype=torch.float32)
    unet.to(states["lora"].accelerator.device).requires_grad_(False)
    unet.add_adapter(LORA)
    unet.train()
    scheduler = DDPMScheduler.from_pretrained(base_path("tiny"), subfolder="scheduler")
    batch = states["lora"].feed.batch(0, 0)
    arms = {"plain": plain_step(unet, scheduler, batch)}
    for method, state in states.items():
        arms[method] = our_step(state)
    return arms


def block_arms(folder: str) -> dict[str, Step]:
    """The three arms on one block, all with the same weights and the same batch."""
    generator = torch.Generator().manual_seed(0)
    device = Accelerator().device
    batch = Batch(
        latents=torch.randn(1, WIDTH, SIDE, SIDE, generator=generator),
        prompt_embeds=torch.randn(1, PROMPT_TOKENS, PROMPT_WIDTH, generator=generator),
        pooled_prompt_embeds=torch.zeros(1, WIDTH),
        add_time_ids=torch.zeros(1, 6),
    ).mapped(lambda tensor: tensor.to(device))
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    arms = {"plain": plain_step(Block().to(device), scheduler, batch)}
    for method in ("lora", "flat-lora"):
        arms[method] = our_step(block_state(method, scheduler, batch, folder))
    return arms


class Block(nn.Module):
    """A transformer block of SDXL, called like its UNet: latents (B, 1280, 32, 32) are its 1,024 tokens."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            block = BasicTransformerBlock(WIDTH, 20, WIDTH // 20, cross_attention_dim=PROMPT_WIDTH)
            self.block = inject_adapter_in_model(LORA, block.requires_grad_(False))

    def forward(
        self, sample: Tensor, timesteps: Tensor, prompt_embeds: Tensor, added_cond_kwargs: Any, return_dict: bool
    ) -> tuple[Tensor]:
        tokens = self.block(sample.flatten(2).transpose(1, 2), encoder_hidden_states=prompt_embeds)
        return (tokens.transpose(1, 2).reshape(sample.shape),)


@dataclass(frozen=True)
class FixedFeed:
    """Gives every step the same batch."""

    fixed: Batch
    seed: int = 0

    def batch(self, step: int, slot: int) -> Batch:
        return self.fixed


def block_state(method: str, scheduler: Any, batch: Batch, folder: str) -> TrainState:
    """What our `train_step` needs to train the block: what `prepare` would make of a whole base."""
    accelerator = Accelerator()
    config = TrainConfig.from_dict({"method": method, "output_dir": folder, "train_batch_size": 1, "seed": 0})
    model: nn.Module = Block().to(accelerator.device)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    flats = [FlatLora(model, config.perturb.strength, "constant")] if method == "flat-lora" else []
    optimizer, lr_schedule = optimizer_of(list(trainable.values()))
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainState(
        config=config,
        accelerator=accelerator,
        sdxl=cast(Sdxl, None),
        model=model,
        objective=Objective(scheduler),
        trainable=trainable,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        flats=flats,
        feed=cast(Feed, FixedFeed(batch)),
        run=RunDir(Path(folder)),
        total_steps=10_000,
        ema=None,
        tokens={},
    )


def our_step(state: TrainState) -> Step:
    return lambda step: train_step(state, step)


def plain_step(model: Any, scheduler: Any, batch: Batch) -> Step:
    """The step of diffusers' script with cached latents and a single prompt: what a user would write without us."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, lr_schedule = optimizer_of(parameters)
    added = {"text_embeds": batch.pooled_prompt_embeds, "time_ids": batch.add_time_ids}
    count = scheduler.config.num_train_timesteps

    def step(_: int) -> float:
        latents = batch.latents
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, count, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        output = model(noisy, timesteps, batch.prompt_embeds, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        return float(loss.detach().item())

    return step


def optimizer_of(parameters: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4)
    return optimizer, get_scheduler("constant", optimizer)


def compare(arms: dict[str, Step], budget: float) -> dict[str, Any]:
    """Seconds of every arm's steps, taken in turns for about `budget` seconds, and the bytes of one more step each."""
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    turn = 0
    while turn < WARMUP + 5 or time.perf_counter() - started < budget:
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            seconds[name].append(timed(arms[name], turn))
        turn += 1
    measured = {name: values[WARMUP:] for name, values in seconds.items()}
    return {
        "turns": turn - WARMUP,
        "seconds": {name: statistics.quantiles(values, n=4) for name, values in measured.items()},
        "lora / plain": ratio_quartiles(measured["lora"], measured["plain"]),
        "flat-lora / lora": ratio_quartiles(measured["flat-lora"], measured["lora"]),
        "peak_bytes": {name: peak_bytes(step, turn) for name, step in arms.items()},
    }


def timed(step: Step, index: int) -> float:
    synchronize()
    started = time.perf_counter()
    step(index)
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(step: Step, index: int) -> int:
    """The most that the step holds beyond what was allocated before it."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(index)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(index)
    # The allocations one by one, which no public call gives.
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def ratio_quartiles(above: list[float], below: list[float]) -> list[float]:
    return statistics.quantiles([one / other for one, other in zip(above, below, strict=True)], n=4)


def report(subject: str, result: dict[str, Any]) -> None:
    print(f"\n{subject}, {result['turns']} steps of each arm\n")
    print("| arm | s/step | quartiles | peak MiB |\n|---|---|---|---|")
    for name, (low, median, high) in result["seconds"].items():
        memory = result["peak_bytes"][name] / 2**20
        print(f"| {name} | {median:.4f} | {low:.4f} to {high:.4f} | {memory:.1f} |")
    for ratio in ("lora / plain", "flat-lora / lora"):
        low, median, high = result[ratio]
        print(f"{ratio}: {median:.3f} (quartiles {low:.3f} to {high:.3f})")


def save(results: dict[str, Any], threads: int) -> None:
    libraries = {"torch": torch, "diffusers": diffusers, "peft": peft, "accelerate": accelerate}
    record = {
        **results,
        "threads": threads,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "memory": "CUDA's allocator" if torch.cuda.is_available() else "PyTorch's CPU allocator, by its profiler",
        "versions": {name: library.__version__ for name, library in libraries.items()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
