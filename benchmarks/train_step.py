"""Is our LoRA step as fast as diffusers' own, and what does Flat-LoRA add? `python -m benchmarks.train_step`

`plain` is the training step of diffusers' script written with the same libraries and none of our code, all other arms
are our `train_step`: `lora`, and Flat-LoRA with each kind of draw, its norms taken in each step or in each tenth. Two
subjects: the tiny base, with cached latents and batches of 4, and one transformer block of SDXL (1280 wide, 1,024
tokens, cross-attention to 77 tokens of 2048). The arms take turns step by step in one process, so that a noisy machine
hits all alike, and each goes first in turn. The figures are medians of the ratios within a turn. Peak memory is what
one step allocates beyond what is there between steps: PyTorch's allocator as its profiler sees it, on CUDA as the
allocator counts it. Launches are operators that work on numbers; those beyond LoRA's are given for each adapted layer.
Writes benchmarks/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
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

from benchmarks.turns import Step, compare
from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.data.batches import Feed
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.ground.run_dir import RunDir
from flatlora_diffusion.method.configured import step_gradient
from flatlora_diffusion.sdxl.loading import base_path
from flatlora_diffusion.sdxl.objective import Batch, Objective
from flatlora_diffusion.sdxl.pipeline import Sdxl
from flatlora_diffusion.training.state import TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

RANK = 16
LAYERS = {"tiny base": 88, "SDXL block": 8}  # that carry a LoRA
WIDTH, SIDE, PROMPT_TOKENS, PROMPT_WIDTH = 1280, 32, 77, 2048
LORA = LoraConfig(
    r=RANK,
    lora_alpha=RANK,
    init_lora_weights="gaussian",
    target_modules=["to_q", "to_k", "to_v", "to_out.0"],
)

ARMS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "full": {},
    "full, norms every 10": {"perturb_norm_every": 10},
    "low-rank": {"perturb_draw": "low_rank"},
    "low-rank, norms every 10": {"perturb_draw": "low_rank", "perturb_norm_every": 10},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50, help="time to spend on each subject")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for subject, make_arms in (("tiny base", tiny_base_arms), ("SDXL block", block_arms)):
            arms = make_arms(folder)
            results[subject] = {"layers": LAYERS[subject], **compare(arms, args.seconds)}
            report(subject, results[subject])
    save(results, args.threads)


def tiny_base_arms(folder: str) -> dict[str, Step]:
    """The arms on the base that ships with us, as its users train it, the latents encoded before."""
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
    states = {arm: prepare(config.replace(**changes), samples) for arm, changes in ARMS.items()}
    unet = UNet2DConditionModel.from_pretrained(base_path("tiny"), subfolder="unet", dtype=torch.float32)
    unet.to(states["lora"].accelerator.device).requires_grad_(False)
    unet.add_adapter(LORA)
    unet.train()
    scheduler = DDPMScheduler.from_pretrained(base_path("tiny"), subfolder="scheduler")
    batch = states["lora"].feed.batch(0, 0)
    arms = {"plain": plain_step(unet, scheduler, batch)}
    return arms | {arm: our_step(state) for arm, state in states.items()}


def block_arms(folder: str) -> dict[str, Step]:
    """The arms on one block, all with the same weights and the same batch."""
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
    for arm, changes in ARMS.items():
        arms[arm] = our_step(block_state(changes, scheduler, batch, folder))
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


def block_state(changes: dict[str, Any], scheduler: Any, batch: Batch, folder: str) -> TrainState:
    """What our `train_step` needs to train the block: what `prepare` would make of a whole base."""
    accelerator = Accelerator()
    settings = {"output_dir": folder, "train_batch_size": 1, "seed": 0, "sigma_schedule": "constant", **changes}
    config = TrainConfig.from_dict(settings)
    model: nn.Module = Block().to(accelerator.device)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradient = step_gradient({"unet": model}, trainable, config.perturb, 0, total_steps=10_000)
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
        gradient=gradient,
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


def report(subject: str, result: dict[str, Any]) -> None:
    print(f"\n{subject}, {result['turns']} steps of each arm\n")
    print("| arm | s/step | quartiles | / LoRA | quartiles | peak MiB | launches a layer |")
    print("|---|---|---|---|---|---|---|")
    calls = result["launches"]
    for name, (low, median, high) in result["seconds"].items():
        memory = result["peak_bytes"][name] / 2**20
        ratio, more = "| |", ""
        if (key := f"{name} / lora") in result:
            ratio = "{1:.3f} | {0:.3f} to {2:.3f} |".format(*result[key])
            more = f"{(calls[name] - calls['lora']) / result['layers']:+.1f}"
        print(f"| {name} | {median:.4f} | {low:.4f} to {high:.4f} | {ratio} {memory:.1f} | {more} |")
    low, median, high = result["lora / plain"]
    print(f"lora / plain: {median:.3f} (quartiles {low:.3f} to {high:.3f})")


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
