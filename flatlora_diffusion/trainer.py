"""DreamBooth-LoRA training of an SDXL UNet, plain or flat: the loop, its draws, checkpoints and resume.

Every draw is a function of (seed, purpose, step, slot) or of (seed, sample, epoch), with slot = micro_batch *
world_size + rank. So resuming needs no RNG state, two processes draw what one process with accumulation 2 draws, and
LoRA and Flat-LoRA see the same images, crops, noise and timesteps.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from flatlora_diffusion.adapter import LORA_FILE, save_lora
from flatlora_diffusion.checkpoint import load_state, save_state
from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.dataset import load_samples, manifest
from flatlora_diffusion.generate import generate_images
from flatlora_diffusion.loss import diffusion_loss, draw_targets
from flatlora_diffusion.run_dir import RunDir
from flatlora_diffusion.seeds import derive_seed, generator
from flatlora_diffusion.train_state import TrainState, prepare

logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> Path:
    """Train as `config` says and return the path of the LoRA file.

    Raises ConfigError for settings, images or a model that cannot be used, RunError when the run cannot go on.
    """
    samples = load_samples(
        Path(config.data.instance_data_dir), config.data.instance_prompt, config.data.caption_column
    )
    logger.info(samples.summary)
    checkpoint = config.run.resume_from_checkpoint
    if checkpoint is not None:
        config = RunDir(Path(config.run.output_dir)).filled_in(config)
    state = prepare(config, samples.samples)
    _loop(state, _start(state) if checkpoint is None else _resume(state, checkpoint))
    state.accelerator.wait_for_everyone()
    path = state.run.folder / LORA_FILE
    if state.accelerator.is_main_process:
        save_lora(state.sdxl.unet, state.run.folder)
        _validate(state)
        state.run.add_event({"event": "finished", "step": state.total_steps})
    if state.flat is not None:
        state.flat.detach()
    state.accelerator.end_training()
    return path


def train_step(state: TrainState, step: int) -> float:
    """Do optimizer step `step` and return the mean loss of its micro-batches. Raises RunError if it is not finite."""
    accumulation = state.config.optim.gradient_accumulation_steps
    losses = []
    for micro in range(accumulation):
        slot = micro * state.accelerator.num_processes + state.accelerator.process_index
        batch = state.feed.batch(step, slot)
        rng = generator(batch.latents.device, state.feed.seed, "diffusion", step, slot)
        noise, timesteps = draw_targets(state.sdxl.scheduler, batch.latents, rng)
        last = micro + 1 == accumulation
        sync = nullcontext() if last else state.accelerator.no_sync(state.unet)
        with sync, _dropout_draws(state, step, slot), _perturbed(state, step, slot):
            loss = diffusion_loss(state.unet, state.sdxl.scheduler, batch, noise, timesteps)
            state.accelerator.backward(loss / accumulation)
        losses.append(loss.detach())
    value = torch.stack(losses).mean().item()
    if not math.isfinite(value):
        raise RunError(_non_finite(state, step))
    state.accelerator.clip_grad_norm_(state.trainable.values(), state.config.optim.max_grad_norm)
    state.optimizer.step()
    state.lr_schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    return value


def _loop(state: TrainState, first: int) -> None:
    run = state.config.run
    is_main = state.accelerator.is_main_process
    bar = tqdm(
        range(first, state.total_steps),
        initial=first,
        total=state.total_steps,
        desc=state.config.perturb.method,
        disable=not is_main,
    )
    began = time.monotonic()
    for step in bar:
        started = time.monotonic()
        lr = state.lr_schedule.get_last_lr()[0]
        loss = train_step(state, step)
        now = time.monotonic()
        if not is_main:
            continue
        left = (now - began) / (step + 1 - first) * (state.total_steps - step - 1)
        sigma = 0.0 if state.flat is None else state.flat.sigma_at(step)
        bar.set_postfix(loss=f"{loss:.4f}", sigma=f"{sigma:.3f}")
        state.run.add_event(
            {
                "event": "step",
                "step": step,
                "loss": loss,
                "lr": lr,
                "sigma": sigma,
                "seconds": round(now - started, 4),
                "eta": round(left, 1),
                "memory": _memory_in_use(state.accelerator.device),
            }
        )
        if (step + 1) % run.checkpointing_steps == 0:
            _save_checkpoint(state, step + 1)


def _perturbed(state: TrainState, step: int, slot: int) -> AbstractContextManager[None]:
    """W + eps around forward and backward; with `perturb_per=step` all micro-batches of a step share one eps."""
    if state.flat is None:
        return nullcontext()
    return state.flat.perturb(step, slot if state.config.perturb.perturb_per == "microbatch" else 0)


@contextmanager
def _dropout_draws(state: TrainState, step: int, slot: int) -> Iterator[None]:
    """LoRA dropout draws from the global generator: seed it for this micro-batch, then put it back."""
    if state.config.adapter.lora_dropout == 0:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(state.feed.seed, "dropout", step, slot))
        yield


def _start(state: TrainState) -> int:
    if state.accelerator.is_main_process:
        state.run.start(state.config.to_dict(), manifest(state.feed.samples))
    return 0


def _resume(state: TrainState, name: str) -> int:
    folder = state.run.checkpoint(name)
    changed = state.run.changed_settings(state.config)
    if changed:
        raise ConfigError(f"{folder.name} was made with {'; '.join(changed)}; resume with the settings it had")
    if manifest(state.feed.samples) != state.run.manifest():
        raise ConfigError(
            f"the images or captions have changed since {folder.name} was saved; start a new run instead"
        )
    step, extra = load_state(folder, state.trainable, state.optimizer.optimizer, state.lr_schedule)
    if state.accelerator.scaler is not None and extra["scaler"]:
        state.accelerator.scaler.load_state_dict(extra["scaler"])
    logger.info("resuming from %s", folder.name)
    return step


def _save_checkpoint(state: TrainState, step: int) -> None:
    with state.run.new_checkpoint(step, state.config.run.checkpoints_total_limit) as folder:
        save_lora(state.sdxl.unet, folder)
        scaler = state.accelerator.scaler
        extra = {"scaler": None if scaler is None else scaler.state_dict()}
        save_state(folder, step, state.trainable, state.optimizer.optimizer, state.lr_schedule, extra)


def _validate(state: TrainState) -> None:
    """Preview images of the finished LoRA, with seeds 0, 1, ..."""
    run = state.config.run
    if run.validation_prompt is None:
        return
    state.run.images.mkdir(exist_ok=True)
    prompts = [run.validation_prompt] * run.num_validation_images
    images = generate_images(state.sdxl, prompts, list(range(len(prompts))), resolution=state.feed.resolution)
    for seed, image in enumerate(images):
        image.save(state.run.images / f"validation-seed{seed}.png")


def _non_finite(state: TrainState, step: int) -> str:
    names = [sample.id for slot in range(state.feed.slots) for sample in state.feed.samples_at(step, slot)]
    advice = {
        "fp16": "use --mixed_precision bf16",
        "bf16": "lower --learning_rate",
        "no": "lower --learning_rate",
    }[state.config.optim.mixed_precision]
    return f"the loss of step {step} is not finite; images of that step: {', '.join(names)}. To go on, {advice}"


def _memory_in_use(device: torch.device) -> int:
    """Bytes: the peak of the device's allocator, or this process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
