"""DreamBooth-LoRA training of SDXL, with or without Flat-LoRA: the steps of a run and its loop.

Every random draw is a function of (seed, purpose, step, slot) or of (seed, sample, epoch), with slot = micro_batch *
world_size + rank. So resuming needs no RNG state, two processes draw what one process with accumulation 2 draws, and
LoRA and Flat-LoRA see the same images, crops, noise and timesteps.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from flatlora_diffusion.adapter.new_tokens import rescale_embeddings
from flatlora_diffusion.config import RunError, StoppedError, TrainConfig
from flatlora_diffusion.data.class_images import load_class_samples
from flatlora_diffusion.data.dataset import Sample, SampleSet
from flatlora_diffusion.data.sources import hold_out, load_training_set
from flatlora_diffusion.families.device import any_process, one_training
from flatlora_diffusion.memory.preflight import log_memory
from flatlora_diffusion.signals import Interrupted, describe_interruption, hold_signals
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.storage.run_lock import lock_folder
from flatlora_diffusion.training.checkpoint import load_best, restore_checkpoint, save_checkpoint, start_run
from flatlora_diffusion.training.disk_space import check_disk_space
from flatlora_diffusion.training.failure import friendly_errors, non_finite_slots, non_finite_text, save_on_failure
from flatlora_diffusion.training.finish import present, save_result
from flatlora_diffusion.training.first_gradients import start_from_gradients
from flatlora_diffusion.training.holdout import Holdout
from flatlora_diffusion.training.image_losses import ImageLosses
from flatlora_diffusion.training.loss_scale import loss_scale
from flatlora_diffusion.training.members import train_members
from flatlora_diffusion.training.micro_batches import micro_batches
from flatlora_diffusion.training.previews import Previews, is_due
from flatlora_diffusion.training.resolve_config import resolve
from flatlora_diffusion.training.selfcheck import begin_self_check
from flatlora_diffusion.training.state import (
    LossIncrease,
    TrainState,
    ema_weights,
    memory_in_use,
    prepare,
    set_backends,
)
from flatlora_diffusion.training.stopping import StopRequests
from flatlora_diffusion.training.trackers import log_to_trackers

logger = logging.getLogger(__name__)

# Each skipped step halves fp16's loss scale, which starts at 2^16: after 20 it is below 1 and no longer the cause.
MAX_SKIPPED_STEPS = 20


def train(config: TrainConfig) -> Path:
    """Train a LoRA.

    With `members` several runs are trained and their LoRAs averaged.

    Args:
        config: the settings; `output_dir` is the run folder.

    Returns:
        The path of the LoRA file for diffusers.

    Raises:
        ConfigError: settings, images or a model that cannot be used, or a folder that another run writes into.
        StoppedError: a stop was requested.
        RunError: the run cannot go on.
    """
    folder = Path(config.run.output_dir)
    # All processes of a launch are one run, so only the main process takes the lock.
    with one_training() as process, lock_folder(folder, "output_dir") if process.is_main_process else nullcontext():
        run = RunDir(folder)
        if config.average.members is not None:
            return train_members(config, run, train_run)
        return train_run(config, run)


def train_run(requested: TrainConfig, run: RunDir, images: SampleSet | None = None) -> Path:
    """Train a single run: resolve, load, estimate, build, start or restore, loop, choose, export, present.

    Args:
        requested: the settings, in which seed, precision, resolution and steps may be open.
        run: the folder of the run.
        images: by default those of the settings.
    """
    with describe_interruption(_nothing_trained):
        config = resolve(requested, run)
        check_disk_space(config)
        images = load_training_set(config.data) if images is None else images
        logger.info(images.summary)
        samples, heldout = hold_out(images.samples, config.data.holdout_images)
        log_memory(config, samples)
        state = _build(config, samples, heldout)
    with _close_at_end(state):
        with save_on_failure(state), friendly_errors(state.config):
            previews, first_step = _start_or_restore(state, config.run.resume_from_checkpoint)
            with StopRequests(run, config.optim.max_train_seconds).listen() as stops:
                steps_done = _loop(state, first_step, previews, stops)
                _choose_checkpoint(state, steps_done)
                path = save_result(state)
        _present(state, previews, stops, path)
    return path


def _build(config: TrainConfig, samples: Sequence[Sample], heldout: Sequence[Sample]) -> TrainState:
    set_backends(config)  # before the first kernel, which may be one of the class images'
    with friendly_errors(config):
        return prepare(config, samples, load_class_samples(config), heldout)


def _start_or_restore(state: TrainState, checkpoint: str | None) -> tuple[Previews | None, int]:
    """The previews, None except on the main process, and the first step to train."""
    with describe_interruption(_nothing_trained):
        previews = Previews(state) if state.accelerator.is_main_process else None
        if checkpoint is None:
            start_from_gradients(state)
            start_run(state)
            first_step = 0
        else:
            first_step = restore_checkpoint(state, checkpoint)
        if previews is not None and first_step == 0:
            previews.make("base", 0)
    return previews, first_step


def _loop(state: TrainState, first_step: int, previews: Previews | None, stops: StopRequests) -> int:
    """Train from `first_step` to the last step, or until held-out images end the run; return the steps done."""
    checkpointing_steps = state.config.run.checkpointing_steps
    is_main = previews is not None
    holdout, measurements = _measurements(state, first_step) if is_main else (None, [])
    steps = tqdm(
        range(first_step, state.end),
        initial=first_step,
        total=state.end,
        desc=state.config.perturb.method,
        disable=not is_main,
    )
    check = begin_self_check(state) if first_step == 0 else None
    loop_start = time.monotonic()
    for step in steps:
        step_start = time.monotonic()
        lr = float(state.lr_schedule.get_last_lr()[0])
        loss = train_step(state, step)
        done = step + 1
        if previews is not None:
            now = time.monotonic()
            eta = (now - loop_start) / (done - first_step) * (state.end - done)
            steps.set_postfix(_log_step(state, step, loss, lr, now - step_start, eta))
            if check is not None:
                check.step_done(loss, now - step_start)
            if done < state.end and is_due(state, step):
                with ema_weights(state):
                    previews.make(f"step-{done}", done, lambda: stops.reason() is not None)
        stop_reason = any_process(state.accelerator, stops.reason())
        at_checkpoint = done % checkpointing_steps == 0
        for measurement in measurements if stop_reason is None and (at_checkpoint or done == state.end) else ():
            measurement.measure(done)
        if is_main and (state.run.take_save_request() or at_checkpoint or stop_reason is not None):
            save_checkpoint(state, done)
        if stop_reason is not None and done < state.end:
            if is_main:
                state.run.add_event({"event": "stopped", "step": done, "reason": stop_reason})
            raise StoppedError(f"stopped after step {done} by {stop_reason}; --resume_from_checkpoint latest goes on")
        if at_checkpoint and _patience_is_over(state, holdout):
            logger.info("step %d is the last: the held-out loss has stopped falling", done)
            return done
    return state.end


def _measurements(state: TrainState, first_step: int) -> tuple[Holdout | None, list[Holdout | ImageLosses]]:
    """The held-out loss, and everything that is measured at checkpoints."""
    holdout = Holdout(state, state.heldout, first_step) if state.heldout else None
    images = ImageLosses(state, first_step) if state.config.run.image_loss_draws else None
    return holdout, [measurement for measurement in (holdout, images) if measurement is not None]


def train_step(state: TrainState, step: int) -> float:
    """Do optimizer step `step`, counted from 0.

    Returns:
        The mean loss of the step's micro-batches over all processes.

    Raises:
        RunError: the loss or the gradient is not finite; the weights are unchanged. With fp16's loss scaler only after
            `MAX_SKIPPED_STEPS` gradients in a row that are not finite.
    """
    accelerator, draws = state.accelerator, DrawHash()
    losses = state.gradient.compute(step, micro_batches(state, step, draws))
    ascent = state.gradient.ascent
    values = [losses] if ascent is None else [losses, ascent.losses, [ascent.first_order_increase]]
    means = accelerator.reduce(torch.stack([torch.stack(value).mean() for value in values]), "mean")
    norm = accelerator.clip_grad_norm_(state.trainable.values(), state.config.optim.max_grad_norm or math.inf)
    loss, *ascent_values, gradient_norm = torch.stack([*means, norm]).tolist()  # a single wait for the device
    if not math.isfinite(loss):
        raise RunError(non_finite_text(state, step, "loss", non_finite_slots(state, losses)))
    # fp16's scaler skips a step whose gradient overflows and lowers its scale.
    if not math.isfinite(gradient_norm) and accelerator.scaler is None:
        raise RunError(non_finite_text(state, step, "gradient", list(range(state.batches.slots))))
    state.progress.loss_increase = None
    if state.gradient.ascends and ascent is None and math.isfinite(gradient_norm):
        _warn_of_no_ascent(state, step)
    if ascent_values:
        perturbed_loss, first_order = ascent_values
        state.progress.loss_increase = _loss_increase(loss, perturbed_loss, first_order / loss_scale(accelerator))
    state.progress.draws = draws.hexdigest()  # before the update, for which the device would have to be waited for
    _update(state, step, is_finite=math.isfinite(gradient_norm))
    return loss


def _warn_of_no_ascent(state: TrainState, step: int) -> None:
    """Warn once: half precision can overflow in the gradient of W while those of A and B are finite."""
    state.progress.missed_ascents += 1
    if state.progress.missed_ascents == 1:
        logger.warning(
            "method=%s: the gradient to climb is 0 or not finite in step %d, which is a step of plain LoRA; if events "
            "of later steps have no `rise` either, give another --mixed_precision than %s",
            state.config.perturb.method,
            step,
            state.config.optim.mixed_precision,
        )


def _loss_increase(loss: float, perturbed_loss: float, first_order: float) -> LossIncrease | None:
    """Relative to the loss; None if that is 0, or the perturbed loss is not finite."""
    if loss <= 0 or not math.isfinite(perturbed_loss):
        return None
    return LossIncrease(perturbed_loss / loss - 1, first_order / loss)


def _update(state: TrainState, step: int, is_finite: bool) -> None:
    """Step the optimizer. Raises RunError after too many steps in a row that fp16's scaler has skipped."""
    state.progress.steps_done = None
    learning_rate, scale = float(state.lr_schedule.get_last_lr()[0]), loss_scale(state.accelerator)
    if is_finite:
        state.gradient.before_update(step, learning_rate)
    state.optimizer.step()
    was_skipped = state.optimizer.step_was_skipped
    if not was_skipped:
        state.gradient.after_update(learning_rate, scale)
        if state.ranks is not None:
            state.ranks.step_done(step + 1)
    state.progress.loss_scale = None if state.accelerator.scaler is None else scale
    state.progress.skipped_steps = state.progress.skipped_steps + 1 if was_skipped else 0
    if state.progress.skipped_steps == MAX_SKIPPED_STEPS:
        state.progress.steps_done = step
        raise RunError(non_finite_text(state, step, "gradient", list(range(state.batches.slots))))
    if state.trains_tokens(step) and not was_skipped:
        rescale_embeddings(state.base.pipeline)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # PyTorch's, if the first is skipped
        state.lr_schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None and not was_skipped:
        state.ema.step(state.trainable.values())
    state.progress.steps_done = step + 1


def _log_step(state: TrainState, step: int, loss: float, lr: float, seconds: float, eta: float) -> dict[str, str]:
    """Log a step to the run's events and the trackers, and return the text of the progress bar."""
    sigma, increase = state.gradient.sigma_at(step), state.progress.loss_increase
    rise = {} if increase is None else {"rise": increase.measured}
    scale = state.progress.loss_scale
    scaler = {} if scale is None else {"loss_scale": scale, "is_skipped": state.progress.skipped_steps > 0}
    state.run.add_event(
        {
            "event": "step",
            "step": step,
            "loss": loss,
            **rise,
            "lr": lr,
            "sigma": sigma,
            **scaler,
            "draws": state.progress.draws,
            "seconds": round(seconds, 4),
            "eta": round(eta, 1),
            "memory": memory_in_use(state.accelerator.device),
        }
    )
    log_to_trackers(state.accelerator, {"loss": loss, **rise, "lr": lr, "sigma": sigma}, step)
    return {"loss": f"{loss:.4f}", **{name: f"{value:.1%}" for name, value in rise.items()}, "sigma": f"{sigma:.3f}"}


def _patience_is_over(state: TrainState, holdout: Holdout | None) -> bool:
    """Whether --holdout_patience ends the run; all processes get the main process's answer."""
    if not state.config.data.holdout_patience:
        return False
    reason = "the held-out images" if holdout is not None and holdout.is_over() else None
    return any_process(state.accelerator, reason) is not None


def _choose_checkpoint(state: TrainState, steps_done: int) -> None:
    """With held-out images, take the weights of the checkpoint with the lowest held-out loss."""
    if state.config.data.holdout_images:
        is_main = state.accelerator.is_main_process
        state.progress.last_step = load_best(state, steps_done) if is_main else steps_done


def _present(state: TrainState, previews: Previews | None, stops: StopRequests, path: Path) -> None:
    """Make the last previews, the model card and the upload of the LoRA that is saved in `path`."""
    if previews is not None:
        outcome = f"after the LoRA was saved in {path}; last previews, card or upload are missing"
        with describe_interruption(lambda: outcome):
            stops.raise_if_signaled()
            present(state, previews)
    state.accelerator.wait_for_everyone()


@contextmanager
def _close_at_end(state: TrainState) -> Iterator[None]:
    """Free the memory at the end. Raises Interrupted for a signal that came meanwhile."""
    try:
        yield
    finally:
        with hold_signals() as signals:
            state.close()
    if signals:  # a comparison must not go on with its next run
        lora = state.run.folder / LORA_FILE
        raise Interrupted(signals[0], f"after the LoRA was saved in {lora}; nothing is missing")


def _nothing_trained() -> str:
    return "before the first step; nothing was trained"
