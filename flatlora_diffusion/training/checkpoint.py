"""A run's beginning, its checkpoints and its resumption, as safetensors and JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.adapter.setup import anchors_of
from flatlora_diffusion.config import TEXT_PARTS, ConfigError, TrainConfig, settings_with
from flatlora_diffusion.data.dataset import manifest
from flatlora_diffusion.method.row_norms import NormState
from flatlora_diffusion.storage.hashing import base_fingerprint, tensors_sha256
from flatlora_diffusion.storage.tensor_io import load_optimizer, load_tensors, optimizer_tensors, save_tensors
from flatlora_diffusion.training.export_lora import save_lora
from flatlora_diffusion.training.optimizer import set_lr
from flatlora_diffusion.training.state import TrainState, averaged
from flatlora_diffusion.training.trackers import start_trackers

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"


def start(state: TrainState) -> int:
    """Make the run folder of a new run and return its first step, 0."""
    if state.accelerator.is_main_process:
        state.run.start(state.config.to_dict(), _manifest(state))
        lora = tensors_sha256(state.trainable.values())
        processes = state.accelerator.num_processes
        state.run.add_event({"event": "start", **_base(state), "lora": lora, "processes": processes})
    start_trackers(state.accelerator, state.config)
    return 0


def restore(state: TrainState, name: str) -> int:
    """Load checkpoint `name` into `state` and return the step that comes next.

    Raises ConfigError for a checkpoint that is not there, and for settings, images, a base or a number of processes
    that would alter the steps that were taken.
    """
    folder = state.run.checkpoint(name)
    _check_alike(state, folder.name)
    saved = {**TrainConfig().to_dict(), **state.run.config()}
    _keep_ramp(state, folder, saved)
    step = load_state(state, folder)
    if state.total_steps < step:
        raise ConfigError(
            f"max_train_steps={state.total_steps} is less than the {step} steps that {folder.name} has taken; give at "
            "least as many, or resume from an earlier checkpoint"
        )
    if state.end < step:
        raise ConfigError(
            f"holdout_folds={state.config.data.holdout_folds} have found {state.end} steps, fewer than the {step} "
            f"that {folder.name} has taken; resume from an earlier checkpoint, or leave --resume_from_checkpoint out"
        )
    if state.total_steps != saved["max_train_steps"]:
        logger.info("%s", _new_end(state, step, saved))
    now = state.config.to_dict()
    changed = {one: [saved[one], now[one]] for one in sorted(settings_with("retryable")) if now[one] != saved[one]}
    for one, (before, after) in changed.items():
        logger.info("%s=%s in place of %s from here on", one, after, before)
    state.accelerator.wait_for_everyone()  # all have read what the first one writes anew
    if state.accelerator.is_main_process:
        state.run.forget_after(step)
        state.run.update(now)
        state.run.add_event({"event": "resumed", "step": step, "changed": changed})
    logger.info("resuming from %s; steps left: %d", folder.name, state.end - step)
    start_trackers(state.accelerator, state.config)
    return step


def _keep_ramp(state: TrainState, folder: Path, saved: Mapping[str, Any]) -> None:
    """A run that has finished and is trained longer stays at the sigma that its ramp has reached."""
    done = load_tensors(folder / STATE_FILE)[1]["step"]
    if not done == saved["max_train_steps"] < state.total_steps or saved["sigma_ramp_steps"] is not None:
        return
    state.progress.config = state.config.replace(sigma_ramp_steps=done)
    state.gradient.detach()
    state.begin_gradient()


def _new_end(state: TrainState, step: int, saved: Mapping[str, Any]) -> str:
    """What becomes of learning rate and sigma when a run goes on to another end."""
    config = state.config
    text = f"{state.total_steps} steps in place of {saved['max_train_steps']}: "
    rate = float(state.lr_schedule.get_last_lr()[0])
    text += f"the learning rate ({config.optim.lr_scheduler}) follows the new end, {rate:.3g} from here on"
    if not config.perturb.draws_noise or config.perturb.sigma_schedule == "constant":
        return text
    ramp = "has ended" if config.perturb.sigma_ramp_steps == step else "follows the new end, too"
    return f"{text}; sigma's ramp {ramp}, {state.gradient.sigma_at(step):.3g} from here on"


def save_checkpoint(state: TrainState, step: int) -> None:
    """Write `checkpoint-STEP/`: all that a resumed run needs, and the LoRA so far as a loadable file.

    Of more than --checkpoints_total_limit the oldest goes, but not the one that is the best so far.
    """
    losses = state.run.holdout_losses()
    best = [best_step(losses)] if losses else []
    with state.run.new_checkpoint(step, state.config.run.checkpoints_total_limit, best) as folder:
        save_state(state, folder, step)
        with averaged(state):
            save_lora(state, folder, step)
    if state.accelerator.is_main_process:
        state.run.add_event({"event": "checkpoint", "step": step})


def save_state(state: TrainState, folder: Path, step: int) -> None:
    """Write the state after `step` optimizer steps. Draws are functions of the step, so no RNG state is needed."""
    tensors, header = optimizer_tensors(state.optimizer.optimizer)
    tensors |= {f"trained.{name}": parameter for name, parameter in state.trainable.items()}
    tensors |= {f"start.{name}": weight for name, weight in anchors_of(state.sdxl.pipeline).items()}
    extra: dict[str, Any] = {}
    if state.accelerator.scaler is not None:
        extra["scaler"] = state.accelerator.scaler.state_dict()
    if state.ema is not None:
        tensors |= {f"ema.{index}": value for index, value in enumerate(state.ema.shadow_params)}
        extra["ema_step"] = state.ema.optimization_step
    kept = {flat.config.prefix: norms for flat in state.flats if (norms := flat.norm_state()) is not None}
    tensors |= {f"row_stds.{prefix}": norms.stds for prefix, norms in kept.items()}
    extra["row_stds"] = {prefix: norms.interval for prefix, norms in kept.items()}
    if state.ranks is not None:
        of_ranks, extra["ranks"] = state.ranks.state()
        tensors |= {f"ranks.{name}": value for name, value in of_ranks.items()}
    of_method, extra["method"] = state.gradient.state()
    tensors |= {f"method.{name}": value for name, value in of_method.items()}
    schedule = {"last_epoch": state.lr_schedule.last_epoch}
    save_tensors(
        folder / STATE_FILE, tensors, {"step": step, "optimizer": header, "lr_schedule": schedule, "extra": extra}
    )


def load_state(state: TrainState, folder: Path) -> int:
    """Restore what `save_state` wrote; returns the step. Raises ConfigError when something else was trained."""
    tensors, header = load_tensors(folder / STATE_FILE)
    _load_trained(state, folder, tensors)
    load_optimizer(state.optimizer.optimizer, tensors, header["optimizer"])
    state.lr_schedule.last_epoch = header["lr_schedule"]["last_epoch"]
    set_lr(state.lr_schedule)
    extra = header["extra"]
    if state.accelerator.scaler is not None and extra.get("scaler"):
        state.accelerator.scaler.load_state_dict(extra["scaler"])
    if state.ema is not None:
        state.ema.optimization_step = extra["ema_step"]
    for flat in state.flats:
        prefix = flat.config.prefix
        if prefix in extra.get("row_stds", {}):  # there are none in the first step, nor with --perturb_norm_every 1
            flat.load_norm_state(NormState(extra["row_stds"][prefix], tensors[f"row_stds.{prefix}"]))
    state.gradient.load_state(_below("method.", tensors), extra.get("method", {}))
    if state.ranks is not None:
        state.ranks.load_state(_below("ranks.", tensors), extra["ranks"])
    state.progress.steps_done = done = int(header["step"])
    return done


def load_best(state: TrainState, last: int) -> int:
    """Put the weights of the checkpoint with the lowest held-out loss in place of those after `last` steps.

    Returns its step; `last` where no image was held out, or where that is the best.
    """
    losses = state.run.holdout_losses()
    folder = state.run.folder / f"checkpoint-{best_step(losses)}" if losses else None
    if folder is None or best_step(losses) == last or not folder.is_dir():
        return last
    _load_trained(state, folder, load_tensors(folder / STATE_FILE)[0])
    logger.info("the result is %s, at which the loss of the held-out images was lowest", folder.name)
    state.run.add_event({"event": "chosen", "step": best_step(losses)})
    return best_step(losses)


def best_step(losses: Mapping[int, float]) -> int:
    """The step of the lowest loss, the first of several."""
    return min(losses, key=lambda step: (losses[step], step))


def _load_trained(state: TrainState, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Put what was trained, and its average, in place. Raises ConfigError when it was something else."""
    saved = _below("trained.", tensors)
    shapes = {name: parameter.shape for name, parameter in state.trainable.items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise ConfigError(f"{folder.name} holds another LoRA (rank or layers differ); resume with the settings it had")
    with torch.no_grad():
        for name, parameter in state.trainable.items():
            parameter.copy_(saved[name])
        for name, weight in anchors_of(state.sdxl.pipeline).items():
            weight.copy_(tensors[f"start.{name}"])  # another machine's SVD may have found others
    if state.ema is not None:
        state.ema.shadow_params = [_like(tensors[f"ema.{i}"], p) for i, p in enumerate(state.ema.shadow_params)]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _like(value: Tensor, other: Tensor) -> Tensor:
    return value.to(other.device)


def _manifest(state: TrainState) -> list[dict[str, Any]]:
    away = [{**row, "is_held_out": True} for row in manifest(state.heldout)]
    return [*manifest([*state.batches.samples, *state.batches.class_samples]), *away]


def _base(state: TrainState) -> dict[str, str]:
    """The fingerprint of each model of the base."""
    pipeline = state.sdxl.pipeline
    parts = {"base": state.sdxl.unet, **{part: getattr(pipeline, part) for part in (*TEXT_PARTS, "vae")}}
    return {name: base_fingerprint(part) for name, part in parts.items()}


def _check_alike(state: TrainState, name: str) -> None:
    """Raises ConfigError when what comes after checkpoint `name` would not be trained as what came before."""
    run, config = state.run, state.config
    starts = [event for event in run.events() if event["event"] == "start"]
    start = starts[-1] if starts else {}
    # The hashes are those of one precision; where they cannot tell, names must.
    is_known = "vae" in start and config.optim.mixed_precision == run.config().get("mixed_precision")
    is_known = is_known and config.model.quantize_base is None
    told = settings_with("identifies_base") if is_known else ()
    changed = run.changed_settings(config, (*settings_with("retryable"), *told))
    if changed:
        raise ConfigError(f"{name} was made with {'; '.join(changed)}; resume with the settings it had")
    now = _base(state) if is_known else {}
    others = ["unet" if part == "base" else part for part, found in now.items() if found != start[part]]
    if others:
        raise ConfigError(
            f"{name} was made on another base than {config.model.pretrained_model_name_or_path!r} is now (other "
            f"weights: {', '.join(others)}); resume with the base it had"
        )
    processes = state.accelerator.num_processes
    if start.get("processes", processes) != processes:
        raise ConfigError(
            f"{name} was made by {start['processes']} process(es), and now there are {processes}, which would train "
            "on other batches; launch as many as there were"
        )
    if _manifest(state) != run.manifest():
        raise ConfigError(f"the images or captions have changed since {name} was saved; start a new run instead")
