"""Start a run's folder, write its checkpoints and resume from them: safetensors and JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.adapter.setup import anchors_by_part
from flatlora_diffusion.config import ConfigError, TrainConfig, settings_with
from flatlora_diffusion.data.dataset import manifest
from flatlora_diffusion.method.row_norms import NormState
from flatlora_diffusion.storage.hashing import base_fingerprint, tensors_sha256
from flatlora_diffusion.storage.tensor_io import load_optimizer, load_tensors, optimizer_tensors, save_tensors
from flatlora_diffusion.training.export_lora import save_lora
from flatlora_diffusion.training.optimizer import set_lr
from flatlora_diffusion.training.state import TrainState, ema_weights
from flatlora_diffusion.training.trackers import start_trackers

logger = logging.getLogger(__name__)

STATE_FILE = "state.safetensors"


def start_run(state: TrainState) -> None:
    """Create the run folder of a new run, with its settings, manifest and `start` event."""
    if state.accelerator.is_main_process:
        state.run.start(state.config.to_dict(), _manifest(state))
        lora = tensors_sha256(state.trainable.values())
        processes = state.accelerator.num_processes
        state.run.add_event({"event": "start", **_base_fingerprints(state), "lora": lora, "processes": processes})
    start_trackers(state.accelerator, state.config)


def restore_checkpoint(state: TrainState, name: str) -> int:
    """Load the checkpoint `name`, `checkpoint-STEP` or `latest`, and return the next step to train.

    Raises:
        ConfigError: the checkpoint does not exist, or settings, images, base or number of processes differ in a way
            that changes the steps before it.
    """
    folder = state.run.checkpoint(name)
    _check_resumable(state, folder.name)
    saved = {**TrainConfig().to_dict(), **state.run.config()}
    _keep_sigma_ramp(state, folder, saved)
    step = load_state(state, folder)
    if state.total_steps < step:
        raise ConfigError(
            f"max_train_steps={state.total_steps} is below the {step} steps of {folder.name}; give at least {step}, "
            "or resume from an earlier checkpoint"
        )
    if state.total_steps != saved["max_train_steps"]:
        logger.info("%s", _new_length_text(state, step, saved))
    now = state.config.to_dict()
    retryable = sorted(settings_with("retryable"))
    changed = {name: [saved[name], now[name]] for name in retryable if now[name] != saved[name]}
    for setting, (before, after) in changed.items():
        logger.info("%s=%s from here on, instead of %s", setting, after, before)
    state.accelerator.wait_for_everyone()  # all processes have read the files that the main process rewrites
    if state.accelerator.is_main_process:
        state.run.archive_checkpoints_after(step)
        state.run.update(now)
        state.run.add_event({"event": "resumed", "step": step, "changed": changed})
    logger.info("resuming from %s; %d steps left", folder.name, state.end - step)
    start_trackers(state.accelerator, state.config)
    return step


def _keep_sigma_ramp(state: TrainState, folder: Path, saved: Mapping[str, Any]) -> None:
    """Keep sigma's ramp as it was if a finished run is trained longer: sigma stays at its last value."""
    done = load_tensors(folder / STATE_FILE)[1]["step"]
    if not done == saved["max_train_steps"] < state.total_steps or saved["sigma_ramp_steps"] is not None:
        return
    state.progress.config = state.config.replace(sigma_ramp_steps=done)
    state.gradient.detach()
    state.rebuild_gradient()


def _new_length_text(state: TrainState, step: int, saved: Mapping[str, Any]) -> str:
    """The effect of another number of steps on learning rate and sigma."""
    config = state.config
    text = f"{state.total_steps} steps instead of {saved['max_train_steps']}: "
    rate = float(state.lr_schedule.get_last_lr()[0])
    text += f"the learning rate ({config.optim.lr_scheduler}) follows the new length, {rate:.3g} from here on"
    if not config.perturb.draws_noise or config.perturb.sigma_schedule == "constant":
        return text
    ramp = "has ended" if config.perturb.sigma_ramp_steps == step else "follows the new length, too"
    return f"{text}; sigma's ramp {ramp}, {state.gradient.sigma_at(step):.3g} from here on"


def save_checkpoint(state: TrainState, step: int) -> None:
    """Write `checkpoint-STEP/`: the state to resume from, and the LoRA files.

    Beyond --checkpoints_total_limit the oldest checkpoint is deleted, but never that with the lowest held-out loss.
    """
    losses = state.run.holdout_losses()
    best = [best_step(losses)] if losses else []
    with state.run.new_checkpoint(step, state.config.run.checkpoints_total_limit, best) as folder:
        save_state(state, folder, step)
        with ema_weights(state):
            save_lora(state, folder, step)
    if state.accelerator.is_main_process:
        state.run.add_event({"event": "checkpoint", "step": step})


def save_state(state: TrainState, folder: Path, step: int) -> None:
    """Write the state after `step` optimizer steps."""
    # No RNG state: all draws are functions of the step.
    tensors, header = optimizer_tensors(state.optimizer.optimizer)
    tensors |= {f"trained.{name}": parameter for name, parameter in state.trainable.items()}
    tensors |= {f"start.{name}": weight for name, weight in anchors_by_part(state.base.pipeline).items()}
    extra: dict[str, Any] = {}
    if state.accelerator.scaler is not None:
        extra["scaler"] = state.accelerator.scaler.state_dict()
    if state.ema is not None:
        tensors |= {f"ema.{index}": value for index, value in enumerate(state.ema.shadow_params)}
        extra["ema_step"] = state.ema.optimization_step
    norm_states = {flat.config.prefix: norms for flat in state.flats if (norms := flat.norm_state()) is not None}
    tensors |= {f"row_stds.{prefix}": norms.stds for prefix, norms in norm_states.items()}
    extra["row_stds"] = {prefix: norms.interval for prefix, norms in norm_states.items()}
    if state.ranks is not None:
        rank_tensors, extra["ranks"] = state.ranks.state()
        tensors |= {f"ranks.{name}": value for name, value in rank_tensors.items()}
    method_tensors, extra["method"] = state.gradient.state()
    tensors |= {f"method.{name}": value for name, value in method_tensors.items()}
    schedule = {"last_epoch": state.lr_schedule.last_epoch}
    save_tensors(
        folder / STATE_FILE, tensors, {"step": step, "optimizer": header, "lr_schedule": schedule, "extra": extra}
    )


def load_state(state: TrainState, folder: Path) -> int:
    """Restore the state that `save_state` wrote and return its step. Raises ConfigError for another LoRA's state."""
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
        if prefix in extra.get("row_stds", {}):  # absent in the first step, and with --perturb_norm_every 1
            flat.load_norm_state(NormState(extra["row_stds"][prefix], tensors[f"row_stds.{prefix}"]))
    state.gradient.load_state(_with_prefix("method.", tensors), extra.get("method", {}))
    if state.ranks is not None:
        state.ranks.load_state(_with_prefix("ranks.", tensors), extra["ranks"])
    state.progress.steps_done = done = int(header["step"])
    return done


def load_best(state: TrainState, last: int) -> int:
    """Load the weights of the checkpoint with the lowest held-out loss, after `last` steps.

    Returns the step of the weights in `state`: `last` without held-out losses, or if that step has the lowest.
    """
    losses = state.run.holdout_losses()
    best = best_step(losses) if losses else last
    folder = state.run.folder / f"checkpoint-{best}"
    if best == last or not folder.is_dir():
        return last
    _load_trained(state, folder, load_tensors(folder / STATE_FILE)[0])
    logger.info("the result is %s, which has the lowest held-out loss", folder.name)
    state.run.add_event({"event": "chosen", "step": best})
    return best


def best_step(losses: Mapping[int, float]) -> int:
    """The step of the lowest loss; of equal losses the first."""
    return min(losses, key=lambda step: (losses[step], step))


def _load_trained(state: TrainState, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Load the trained weights and their moving average. Raises ConfigError for another LoRA's weights."""
    saved = _with_prefix("trained.", tensors)
    shapes = {name: parameter.shape for name, parameter in state.trainable.items()}
    if shapes != {name: value.shape for name, value in saved.items()}:
        raise ConfigError(f"{folder.name} holds a LoRA of another rank or other layers; resume with its settings")
    with torch.no_grad():
        for name, parameter in state.trainable.items():
            parameter.copy_(saved[name])
        for name, weight in anchors_by_part(state.base.pipeline).items():
            weight.copy_(tensors[f"start.{name}"])  # the SVD of another machine may give others
    if state.ema is not None:
        state.ema.shadow_params = [tensors[f"ema.{i}"].to(p.device) for i, p in enumerate(state.ema.shadow_params)]


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def _manifest(state: TrainState) -> list[dict[str, Any]]:
    heldout = [{**row, "is_held_out": True} for row in manifest(state.heldout)]
    return [*manifest([*state.batches.samples, *state.batches.class_samples]), *heldout]


def _base_fingerprints(state: TrainState) -> dict[str, str]:
    parts = {"base": state.base.denoiser, **state.base.text_encoders, "vae": state.base.vae}
    return {name: base_fingerprint(part) for name, part in parts.items()}


def _check_resumable(state: TrainState, name: str) -> None:
    """Raise ConfigError if the run would have reached checkpoint `name` otherwise with the present settings."""
    run, config = state.run, state.config
    starts = [event for event in run.events() if event["event"] == "start"]
    start = starts[-1] if starts else {}
    # Fingerprints depend on the precision. If they cannot be compared, the base's name must be the same.
    has_fingerprints = "vae" in start and config.optim.mixed_precision == run.config().get("mixed_precision")
    has_fingerprints = has_fingerprints and config.model.quantize_base is None
    base_settings = settings_with("identifies_base") if has_fingerprints else ()
    changed = run.changed_settings(config, (*settings_with("retryable"), *base_settings))
    if changed:
        raise ConfigError(f"{name} was made with {'; '.join(changed)}; resume with its settings")
    fingerprints = _base_fingerprints(state) if has_fingerprints else {}
    others = [
        state.base.family.denoiser if part == "base" else part
        for part, value in fingerprints.items()
        if value != start.get(part)  # another family has other parts
    ]
    if others:
        raise ConfigError(
            f"{name} was made on another base than pretrained_model_name_or_path="
            f"{config.model.pretrained_model_name_or_path!r} (other weights: {', '.join(others)}); use its base"
        )
    processes = state.accelerator.num_processes
    if start.get("processes", processes) != processes:
        raise ConfigError(
            f"{name} was made by {start['processes']} process(es), but {processes} would train on other batches; "
            f"launch {start['processes']}"
        )
    if _manifest(state) != run.manifest():
        raise ConfigError(f"the images or captions have changed since {name} was saved; start a new run")
