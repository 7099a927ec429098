"""Everything that a training step needs: the base with its LoRA, the perturbation, optimizer, schedule and feed."""

from __future__ import annotations

import logging
import math
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from diffusers.optimization import get_scheduler
from torch import nn

from flatlora_diffusion.adapter import add_lora, trainable_parameters
from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.dataset import Sample
from flatlora_diffusion.feed import Feed
from flatlora_diffusion.perturbation import FlatLora
from flatlora_diffusion.run_dir import RunDir
from flatlora_diffusion.sdxl import Sdxl, load_sdxl

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class TrainState:
    """Everything that a training step needs."""

    config: TrainConfig
    accelerator: Accelerator
    sdxl: Sdxl
    unet: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: Any
    lr_schedule: Any
    flat: FlatLora | None
    feed: Feed
    run: RunDir
    total_steps: int


def prepare(config: TrainConfig, samples: list[Sample]) -> TrainState:
    """Load the base, add the LoRA and settle what `config` leaves open (resolution, steps, seed)."""
    accelerator = _accelerator(config)
    dtype = DTYPES[config.optim.mixed_precision]
    sdxl = load_sdxl(config.model, accelerator.device, dtype)
    config = _resolved(config, sdxl, len(samples), accelerator.num_processes)
    optim, seed = config.optim, _known(config.run.seed)
    add_lora(sdxl.unet, config.adapter, seed)
    sdxl.unet.train()
    if optim.gradient_checkpointing:
        sdxl.unet.enable_gradient_checkpointing()
    total_steps = _known(optim.max_train_steps)
    flat = None
    if config.perturb.method == "flat-lora":
        flat = FlatLora(
            sdxl.unet,
            sigma=config.perturb.strength,
            schedule=config.perturb.sigma_schedule,
            total_steps=total_steps,
            seed=seed if config.perturb.perturb_seed is None else config.perturb.perturb_seed,
        )
    trainable = trainable_parameters(sdxl.unet)
    optimizer = torch.optim.AdamW(
        trainable.values(),
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        weight_decay=optim.adam_weight_decay,
        eps=optim.adam_epsilon,
    )
    lr_schedule = get_scheduler(
        optim.lr_scheduler,
        optimizer,
        num_warmup_steps=optim.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=optim.lr_num_cycles,
        power=optim.lr_power,
    )
    feed = Feed(config, sdxl, samples, accelerator.num_processes)
    unet, optimizer = accelerator.prepare(sdxl.unet, optimizer)
    run = RunDir(Path(config.run.output_dir))
    return TrainState(config, accelerator, sdxl, unet, trainable, optimizer, lr_schedule, flat, feed, run, total_steps)


def _accelerator(config: TrainConfig) -> Accelerator:
    try:
        return Accelerator(mixed_precision=config.optim.mixed_precision)
    except ValueError as error:
        raise ConfigError(
            f"mixed_precision={config.optim.mixed_precision!r} cannot be used on this machine: {error}"
        ) from error


def _resolved(config: TrainConfig, sdxl: Sdxl, count: int, processes: int) -> TrainConfig:
    """`config` with resolution, number of steps and seed settled. Raises ConfigError for a size that cannot be."""
    resolution = config.data.resolution or sdxl.resolution
    if resolution % sdxl.size_step:
        near = max(1, round(resolution / sdxl.size_step)) * sdxl.size_step
        raise ConfigError(
            f"resolution={resolution} must be a multiple of {sdxl.size_step} for this base; {near} is the nearest"
        )
    per_step = config.optim.train_batch_size * config.optim.gradient_accumulation_steps * processes
    steps = config.optim.max_train_steps or math.ceil(config.optim.num_train_epochs * count / per_step)
    seed = config.run.seed
    if seed is None:
        (seed,) = broadcast_object_list([secrets.randbelow(2**31)])  # the same on all processes
        logger.info("seed %d", seed)
    return config.replace(resolution=resolution, max_train_steps=steps, seed=seed)


def _known(value: Any) -> Any:
    assert value is not None, "settled before training starts"
    return value
