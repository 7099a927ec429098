"""A run's beginning, its checkpoints and its resumption, as safetensors and JSON."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.dataset import manifest
from flatlora_diffusion.fingerprint import base_fingerprint, tensors_sha256
from flatlora_diffusion.optimizer import set_lr
from flatlora_diffusion.release import save_release
from flatlora_diffusion.run_dir import portable
from flatlora_diffusion.tensor_file import load_optimizer, load_tensors, optimizer_tensors, save_tensors
from flatlora_diffusion.tokens import save_embeddings
from flatlora_diffusion.train_state import TrainState, averaged

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"


def start(state: TrainState) -> int:
    """Make the run folder of a new run and return its first step, 0."""
    if state.accelerator.is_main_process:
        state.run.start(state.config.to_dict(), _manifest(state))
        base, lora = base_fingerprint(state.sdxl.unet), tensors_sha256(state.trainable.values())
        state.run.add_event({"event": "start", "base": base, "lora": lora})
    _start_trackers(state)
    return 0


def restore(state: TrainState, name: str) -> int:
    """Load checkpoint `name` into `state` and return the step that comes next.

    Raises ConfigError for a checkpoint that is not there, and for settings or images that would alter the steps that
    were taken.
    """
    folder = state.run.checkpoint(name)
    changed = state.run.changed_settings(state.config)
    if changed:
        raise ConfigError(f"{folder.name} was made with {'; '.join(changed)}; resume with the settings it had")
    if _manifest(state) != state.run.manifest():
        raise ConfigError(
            f"the images or captions have changed since {folder.name} was saved; start a new run instead"
        )
    step = load_state(state, folder)
    total = state.run.config()["max_train_steps"]
    if state.total_steps != total:
        logger.info(
            "%d steps in place of %d: learning rate and sigma follow the new end from here on",
            state.total_steps,
            total,
        )
        if state.accelerator.is_main_process:
            state.run.update(state.config.to_dict())
    logger.info("resuming from %s; steps left: %d", folder.name, max(0, state.total_steps - step))
    _start_trackers(state)
    return step


def save_checkpoint(state: TrainState, step: int) -> None:
    """Write `checkpoint-STEP/`: all that a resumed run needs, and the LoRA so far as a loadable file."""
    with state.run.new_checkpoint(step, state.config.run.checkpoints_total_limit) as folder:
        save_state(state, folder, step)
        with averaged(state):
            save_release(state, folder, step)
            save_embeddings(state.sdxl.pipeline, folder)
    if state.accelerator.is_main_process:
        state.run.add_event({"event": "checkpoint", "step": step})


def save_state(state: TrainState, folder: Path, step: int) -> None:
    """Write the state after `step` optimizer steps. Draws are functions of the step, so no RNG state is needed."""
    tensors, header = optimizer_tensors(state.optimizer.optimizer)
    tensors |= {f"trained.{name}": parameter for name, parameter in state.trainable.items()}
    extra: dict[str, Any] = {}
    if state.accelerator.scaler is not None:
        extra["scaler"] = state.accelerator.scaler.state_dict()
    if state.ema is not None:
        tensors |= {f"ema.{index}": value for index, value in enumerate(state.ema.shadow_params)}
        extra["ema_step"] = state.ema.optimization_step
    schedule = {"last_epoch": state.lr_schedule.last_epoch, "base_lrs": state.lr_schedule.base_lrs}
    save_tensors(
        folder / STATE_FILE, tensors, {"step": step, "optimizer": header, "lr_schedule": schedule, "extra": extra}
    )


def load_state(state: TrainState, folder: Path) -> int:
    """Restore what `save_state` wrote; returns the step. Raises ConfigError when something else was trained."""
    tensors, header = load_tensors(folder / STATE_FILE)
    saved = {name.removeprefix("trained."): value for name, value in tensors.items() if name.startswith("trained.")}
    shapes = {name: parameter.shape for name, parameter in state.trainable.items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise ConfigError(f"{folder.name} holds another LoRA (rank or layers differ); resume with the settings it had")
    with torch.no_grad():
        for name, parameter in state.trainable.items():
            parameter.copy_(saved[name])
    load_optimizer(state.optimizer.optimizer, tensors, header["optimizer"])
    state.lr_schedule.last_epoch = header["lr_schedule"]["last_epoch"]
    state.lr_schedule.base_lrs = header["lr_schedule"]["base_lrs"]
    set_lr(state.lr_schedule)
    extra = header["extra"]
    if state.accelerator.scaler is not None and extra.get("scaler"):
        state.accelerator.scaler.load_state_dict(extra["scaler"])
    if state.ema is not None:
        state.ema.optimization_step = extra["ema_step"]
        state.ema.shadow_params = [_like(tensors[f"ema.{i}"], p) for i, p in enumerate(state.ema.shadow_params)]
    return int(header["step"])


def _like(value: Tensor, other: Tensor) -> Tensor:
    return value.to(other.device)


def _manifest(state: TrainState) -> list[dict[str, Any]]:
    return manifest([*state.feed.samples, *state.feed.class_samples])


def _start_trackers(state: TrainState) -> None:
    values = {name: value for name, value in portable(state.config.to_dict()).items() if value is not None}
    state.accelerator.init_trackers("flatlora", config=values)
