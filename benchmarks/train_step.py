"""Is our LoRA step as fast as diffusers' own, and what does Flat-LoRA add? `python -m benchmarks.train_step`

`plain` is the training step of diffusers' script written with the same libraries and none of our code, all other arms
are our `train_step`: `lora`, and Flat-LoRA with each kind of draw, its norms taken in each step or in each tenth.
Three subjects: the tiny base, with cached latents and batches of 4; the same with the layers of the demo, its
convolutions among them; and one transformer block of SDXL (1280 wide, 1,024 tokens, cross-attention to 77 tokens of
2048). The arms take turns step by step in one process, so that a noisy machine hits all alike, and each goes first in
turn. The figures are medians of the ratios within a turn. Peak memory is what one step allocates beyond what is there
between steps: PyTorch's allocator as its profiler sees it, on CUDA as the allocator counts it. Launches are operators
that work on numbers; those beyond LoRA's are given for each adapted layer. Writes benchmarks/train_step.json.

With `--base FOLDER` the one subject is that base, as the other flags say; `benchmarks/gpu.sh` does so with SDXL.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from benchmarks import record
from benchmarks.turns import Step, compare
from flatlora_diffusion.config import SAMPLES, TrainConfig
from flatlora_diffusion.data.batches import Batches
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.batch import Batch
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.method.gradient import GradientInputs, step_gradient
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.training.checkpoint import start_run
from flatlora_diffusion.training.first_gradients import start_from_gradients
from flatlora_diffusion.training.state import Progress, TrainState, prepare
from flatlora_diffusion.training.trainer import train_step

RANK = 16
WIDTH, SIDE, PROMPT_TOKENS, PROMPT_WIDTH = 1280, 32, 77, 2048
LORA = LoraConfig(
    r=RANK,
    lora_alpha=RANK,
    init_lora_weights="gaussian",
    target_modules=["to_q", "to_k", "to_v", "to_out.0"],
)

ARMS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "full": {"perturb_draw": "full", "perturb_norm_every": 1},
    "full, norms every 10": {"perturb_draw": "full"},
    "low-rank": {"perturb_norm_every": 1},
    "low-rank, norms every 10": {},
}
LOW_RANK = ("lora", "low-rank", "low-rank, norms every 10")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=50, help="time to spend on each subject")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", help="a folder in diffusers' format; without one, the subjects of the table")
    parser.add_argument("--batch", type=int, default=1, help="of --base")
    parser.add_argument("--resolution", type=int, help="of --base; default: its own")
    parser.add_argument("--mixed_precision", default="no", choices=("no", "fp16", "bf16"), help="of --base")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of --base")
    parser.add_argument("--quantize_base", help="of --base; there is no `plain` arm then")
    parser.add_argument(
        "--arms", nargs="+", choices=[arm for arm in ARMS if arm != "lora"], help="beside lora, of --base"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for subject, make_arms in subjects(args).items():
            arms, layers = make_arms(folder)
            results[subject] = {"layers": layers, **compare(arms, args.seconds)}
            report(subject, results[subject])
    record.save(args.out, results)


def subjects(args: argparse.Namespace) -> dict[str, Callable[[str], tuple[dict[str, Step], int]]]:
    """What makes each subject's arms, and counts the layers that carry a LoRA."""
    if args.base is None:
        tiny = {"train_batch_size": 4}
        return {
            "tiny base": partial(base_arms, tiny),
            "tiny base, the demo's layers": partial(base_arms, {**tiny, "lora_target_modules": "conv"}, arms=LOW_RANK),
            "SDXL block": block_arms,
        }
    settings = {
        "pretrained_model_name_or_path": args.base,
        "train_batch_size": args.batch,
        "resolution": args.resolution,
        "mixed_precision": args.mixed_precision,
        "gradient_checkpointing": args.gradient_checkpointing,
        "quantize_base": args.quantize_base,
    }
    given = {name: value for name, value in settings.items() if value is not None}
    shown = (f"{name} {value}" for name, value in given.items() if not name.startswith("pretrained"))
    arms = [arm for arm in ARMS if arm == "lora" or args.arms is None or arm in args.arms]
    return {f"whole base, {', '.join(shown)}": partial(base_arms, given, arms=arms)}


def base_arms(
    settings: dict[str, Any], folder: str, arms: Collection[str] = tuple(ARMS)
) -> tuple[dict[str, Step], int]:
    """The arms on a whole base, as its users train it, the latents encoded before."""
    data = SAMPLES / "icons_3d"
    config = TrainConfig.from_dict(
        {
            "instance_data_dir": str(data),
            "output_dir": folder,
            "rank": RANK,
            "cache_latents": True,
            "sigma_schedule": "constant",  # so that every timed step is perturbed
            "lr_scheduler": "constant",
            "max_train_steps": 10_000,
            "report_to": "none",
            "seed": 0,
            **settings,
        }
    )
    samples = load_samples(data).samples
    states = {arm: prepare(config.replace(**ARMS[arm]), samples) for arm in arms}
    steps = {arm: our_step(state) for arm, state in states.items()}
    layers = max(len(flat.layers) for state in states.values() for flat in state.flats)
    if config.model.quantize_base is not None or config.adapter.lora_target_modules != "attn":
        return steps, layers  # the plain step adapts plain attention layers
    return {"plain": plain_base_step(config, states["lora"].batches.batch(0, 0)), **steps}, layers


def plain_base_step(config: TrainConfig, batch: Batch) -> Step:
    path = base_path(config.model.pretrained_model_name_or_path)
    dtype = DTYPES[str(config.optim.mixed_precision)]
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", dtype=dtype)
    unet.to(record.DEVICE).requires_grad_(False)
    unet.add_adapter(LORA)
    cast_training_params(unet)
    if config.optim.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    return plain_step(unet, DDPMScheduler.from_pretrained(path, subfolder="scheduler"), batch, dtype)


def block_arms(folder: str) -> tuple[dict[str, Step], int]:
    """The arms on one block, all with the same weights and the same batch."""
    generator = torch.Generator().manual_seed(0)
    device = Accelerator().device
    batch = Batch(
        latents=torch.randn(1, WIDTH, SIDE, SIDE, generator=generator),
        prompts={
            "prompt_embeds": torch.randn(1, PROMPT_TOKENS, PROMPT_WIDTH, generator=generator),
            "pooled_prompt_embeds": torch.zeros(1, WIDTH),
        },
        geometry={"add_time_ids": torch.zeros(1, 6)},
    ).map(lambda tensor: tensor.to(device))
    scheduler = noise_schedule()
    arms = {"plain": plain_step(Block().to(device), scheduler, batch)}
    for arm, changes in ARMS.items():
        state = state_of(Block().to(device), changes, scheduler, batch, folder)
        arms[arm] = our_step(state)
    return arms, len(state.flats[0].layers)


def noise_schedule() -> DDPMScheduler:
    """SDXL's own."""
    return DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


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
class FixedBatches:
    """Gives every step the same batch."""

    fixed: Batch
    seed: int = 0

    def batch(self, step: int, slot: int) -> Batch:
        return self.fixed


def state_of(model: nn.Module, changes: dict[str, Any], scheduler: Any, batch: Batch, folder: str) -> TrainState:
    """What our `train_step` needs to train a model with a LoRA on one batch: what `prepare` makes of a whole base."""
    settings = {"output_dir": folder, "train_batch_size": 1, "seed": 0, "sigma_schedule": "constant", **changes}
    config = TrainConfig.from_dict(settings)
    accelerator = Accelerator(mixed_precision=config.optim.mixed_precision)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    gradient = step_gradient(GradientInputs({"unet": model}, trainable, config.perturb, 0, total_steps=10_000))
    optimizer, lr_schedule = optimizer_of(list(trainable.values()), fused=True)  # as ours is
    model, optimizer = accelerator.prepare(model, optimizer)
    return TrainState(
        accelerator=accelerator,
        base=cast(Base, None),
        model=model,
        objective=SdxlObjective(scheduler),
        trainable=trainable,
        optimizer=optimizer,
        lr_schedule=lr_schedule,
        batches=cast(Batches, FixedBatches(batch)),
        run=RunDir(Path(folder)),
        total_steps=10_000,
        ema=None,
        tokens={},
        base_name=None,
        progress=Progress(config, gradient),
    )


def our_step(state: TrainState) -> Step:
    return lambda step: train_step(state, step)


def ready_step(config: TrainConfig, samples: Sequence[Sample]) -> Step:
    """The same after all that comes before a run's first step, such as the search for rho."""
    state = prepare(config, samples)
    start_from_gradients(state)
    start_run(state)
    return our_step(state)


def plain_step(model: Any, scheduler: Any, batch: Batch, dtype: torch.dtype = torch.float32) -> Step:
    """The step of diffusers' script with cached latents and a single prompt: what a user would write without us."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, lr_schedule = optimizer_of(parameters)
    added = {"text_embeds": batch.prompts["pooled_prompt_embeds"], "time_ids": batch.geometry["add_time_ids"]}
    embeds, count = batch.prompts["prompt_embeds"], scheduler.config.num_train_timesteps

    def step(_: int) -> float:
        latents = batch.latents
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, count, (len(latents),), device=latents.device)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(latents.device.type, dtype, enabled=dtype != torch.float32):
            output = model(noisy, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
        loss = F.mse_loss(output.float(), noise.float(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        return float(loss.detach().item())

    return step


def optimizer_of(parameters: list[nn.Parameter], fused: bool | None = None) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=1e-4, fused=fused)
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
    if "lora / plain" in result:
        print("lora / plain: {1:.3f} (quartiles {0:.3f} to {2:.3f})".format(*result["lora / plain"]))


if __name__ == "__main__":
    main()
