"""DreamBooth-LoRA training of SDXL, plain or flat: the loop, its draws, checkpoints, resume and the end of a run.

Every draw is a function of (seed, purpose, step, slot) or of (seed, sample, epoch), with slot = micro_batch *
world_size + rank. So resuming needs no RNG state, two processes draw what one process with accumulation 2 draws, and
LoRA and Flat-LoRA see the same images, crops, noise and timesteps.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from flatlora_diffusion.adapter.new_tokens import pull_embeddings
from flatlora_diffusion.config import RunError, StoppedError, TrainConfig
from flatlora_diffusion.data.class_images import load_class_samples
from flatlora_diffusion.data.dataset import Sample, SampleSet
from flatlora_diffusion.data.sources import Fold, load_training_set, parted
from flatlora_diffusion.memory.preflight import log_memory
from flatlora_diffusion.sdxl.device import agreed, one_training, this_process
from flatlora_diffusion.storage.hashing import DrawHash
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.run_lock import alone_in
from flatlora_diffusion.training.checkpoint import load_best, restore, save_checkpoint, start
from flatlora_diffusion.training.disk_space import check_room
from flatlora_diffusion.training.failure import explained, kept, non_finite_slots, non_finite_text
from flatlora_diffusion.training.finish import present, save_result
from flatlora_diffusion.training.first_steps import self_check
from flatlora_diffusion.training.first_weights import first_weights
from flatlora_diffusion.training.holdout import Holdout
from flatlora_diffusion.training.holdout_folds import chosen_by_folds
from flatlora_diffusion.training.loss_scale import loss_scale
from flatlora_diffusion.training.members import train_members
from flatlora_diffusion.training.micro_batches import micro_batches
from flatlora_diffusion.training.previews import Previews, is_due
from flatlora_diffusion.training.resolve_config import check_early, new_or_resumed
from flatlora_diffusion.training.state import (
    Rise,
    TrainState,
    averaged,
    memory_in_use,
    prepare,
    put_away,
    set_backends,
)
from flatlora_diffusion.training.stopping import Interrupted, Stopping, interrupted_as, undisturbed
from flatlora_diffusion.training.trackers import tell_trackers

logger = logging.getLogger(__name__)

MOST_SKIPPED_STEPS = 20  # each halves the scale of fp16, which begins at 2^16: below 1 it is not what overflows


def train(config: TrainConfig) -> Path:
    """Train as `config` says and return the path of the LoRA file.

    With --members several runs are trained and averaged; with --holdout_folds a run on all images follows the folds.

    Raises:
        ConfigError: settings, images or a model that cannot be used, or a folder that another run writes into.
        StoppedError: a stop was asked for.
        RunError: the run cannot go on.
    """
    folder = Path(config.run.output_dir)
    # The processes of one launch are one run.
    with one_training() as process, alone_in(folder, "output_dir") if process.is_main_process else nullcontext():
        run = RunDir(folder)
        if config.average.members is not None:
            return train_members(config, run, train_run)
        if not config.data.holdout_folds:
            return train_run(config, run)
        config, images, last_step = chosen_by_folds(config, run, train_run)
        return train_run(config, run, images, last_step=last_step)


def train_run(
    given: TrainConfig,
    run: RunDir,
    images: SampleSet | None = None,
    fold: Fold | None = None,
    last_step: int | None = None,
) -> Path:
    """Train one run from its settings to its last pictures, and return the path of the LoRA file.

    Args:
        given: settings, which may leave open what the run settles.
        run: the folder of the run.
        images: images that were loaded already.
        fold: the cross-validation split whose images are held out.
        last_step: the step to stop after; all steps by default.
    """
    with interrupted_as(_untrained):
        config = _resolve(given, run)
        images = load_training_set(config.data) if images is None else images
        logger.info(images.summary)
        samples, heldout = parted(images.samples, config.data, fold)
        log_memory(config, samples)
        state = _build(config, samples, heldout)
        state.progress.last_step = last_step
    with _put_away_at_the_end(state):
        with kept(state), explained(state.config):
            previews, first = _start_or_restore(state, config.run.resume_from_checkpoint)
            with Stopping(run, config.optim.max_train_seconds) as stopping:
                last = _loop(state, first, previews, stopping)
                _choose(state, last, previews)
                path = save_result(state)
        _present(state, previews, stopping, path)
    return path


def _resolve(given: TrainConfig, run: RunDir) -> TrainConfig:
    """The settings with seed and precision, checked as far as they can be before the model is loaded."""
    config = new_or_resumed(given, run)
    if this_process().is_main_process:
        run.clean()
    check_early(config)
    check_room(config)
    return config


def _build(config: TrainConfig, samples: Sequence[Sample], heldout: Sequence[Sample]) -> TrainState:
    set_backends(config)  # before the first kernel, and for the class images too
    with explained(config):
        return prepare(config, samples, load_class_samples(config), heldout)


def _start_or_restore(state: TrainState, checkpoint: str | None) -> tuple[Previews | None, int]:
    """What makes the previews, None but on the first process, and the first step to do."""
    with interrupted_as(_untrained):
        previews = Previews(state) if state.accelerator.is_main_process else None
        if checkpoint is None:
            first_weights(state)
        first = start(state) if checkpoint is None else restore(state, checkpoint)
        if previews is not None and first == 0:
            previews.make("base", 0)
    return previews, first


def _choose(state: TrainState, last: int, previews: Previews | None) -> None:
    """With held-out images take the checkpoint at which their loss was lowest."""
    if state.config.data.holdout_images:
        state.progress.last_step = load_best(state, last) if previews is not None else last


def _present(state: TrainState, previews: Previews | None, stopping: Stopping, path: Path) -> None:
    """Make the last pictures, the card and the upload of a LoRA that is saved in `path`."""
    if previews is not None:
        with interrupted_as(lambda: f"after the LoRA was saved in {path}; last previews, card or upload are missing"):
            stopping.interrupt()
            present(state, previews)
    state.accelerator.wait_for_everyone()


@contextmanager
def _put_away_at_the_end(state: TrainState) -> Iterator[None]:
    """Free the memory when this ends. Raises Interrupted for a signal that came meanwhile."""
    try:
        yield
    finally:
        with undisturbed() as signals:
            put_away(state)
    if signals:  # a comparison must not go on with its next run
        raise Interrupted(signals[0], f"after the LoRA was saved in {state.run.folder}; nothing is missing")


def _untrained() -> str:
    return "before the first step; nothing was trained"


def train_step(state: TrainState, step: int) -> float:
    """Do optimizer step `step` and return the mean loss of its micro-batches.

    Raises RunError, with the weights as they were, for a loss or a gradient that is not finite; with the scaler of
    fp16 for the gradients of 20 steps in a row.
    """
    accelerator, draws = state.accelerator, DrawHash()
    losses = state.gradient.compute(step, micro_batches(state, step, draws))
    ascent = state.gradient.ascent
    told = [losses] if ascent is None else [losses, ascent.losses, [ascent.first_order_increase]]
    means = accelerator.reduce(torch.stack([torch.stack(some).mean() for some in told]), "mean")
    norm = accelerator.clip_grad_norm_(state.trainable.values(), state.config.optim.max_grad_norm or math.inf)
    value, *risen, gradient = torch.stack([*means, norm]).tolist()  # all in one wait for the device
    if not math.isfinite(value):
        raise RunError(non_finite_text(state, step, "loss", non_finite_slots(state, losses)))
    # fp16's scaler leaves out a step whose gradient overflows, and goes on with a lower scale.
    if not math.isfinite(gradient) and accelerator.scaler is None:
        raise RunError(non_finite_text(state, step, "gradient", list(range(state.batches.slots))))
    state.progress.rise = _rise(value, risen[0], risen[1] / loss_scale(accelerator)) if risen else None
    _update(state, step, is_finite=math.isfinite(gradient))
    state.progress.draws = draws.hexdigest()
    return value


def _rise(loss: float, above: float, first_order_increase: float) -> Rise | None:
    """None where the loss is 0, or not finite above."""
    return Rise(above / loss - 1, first_order_increase / loss) if loss > 0 and math.isfinite(above) else None


def _update(state: TrainState, step: int, is_finite: bool) -> None:
    """Move the weights. A scaler leaves out a step whose gradient overflows; it must not leave out all of them."""
    state.progress.steps_done = None
    learning_rate, scale = float(state.lr_schedule.get_last_lr()[0]), loss_scale(state.accelerator)
    if is_finite:
        state.gradient.before_update(step, learning_rate)
    state.optimizer.step()
    is_taken = not state.optimizer.step_was_skipped
    if is_taken:
        state.gradient.after_update(learning_rate, scale)
        if state.ranks is not None:
            state.ranks.step_done(step + 1)
    state.progress.skipped_steps = 0 if is_taken else state.progress.skipped_steps + 1
    if state.progress.skipped_steps == MOST_SKIPPED_STEPS:
        state.progress.steps_done = step
        raise RunError(non_finite_text(state, step, "gradient", list(range(state.batches.slots))))
    if state.trains_tokens(step) and is_taken:
        pull_embeddings(state.sdxl.pipeline)
    state.lr_schedule.step()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None and is_taken:
        state.ema.step(state.trainable.values())
    state.progress.steps_done = step + 1


def _loop(state: TrainState, first: int, previews: Previews | None, stopping: Stopping) -> int:
    """Train the steps from `first` on; returns how many are done when held-out images or their number end them."""
    run = state.config.run
    holdout = Holdout(state, state.heldout, first) if state.heldout and previews is not None else None
    bar = tqdm(
        range(first, state.end),
        initial=first,
        total=state.end,
        desc=state.config.perturb.method,
        disable=previews is None,
    )
    check = self_check(state) if first == 0 else None
    began = time.monotonic()
    for step in bar:
        started = time.monotonic()
        lr = float(state.lr_schedule.get_last_lr()[0])
        loss = train_step(state, step)
        done = step + 1
        if previews is not None:
            now = time.monotonic()
            eta = (now - began) / (done - first) * (state.end - done)
            bar.set_postfix(_log(state, step, loss, lr, now - started, eta))
            if check is not None:
                check.step_done(loss, now - started)
            if done < state.end and is_due(state, step):
                with averaged(state):
                    previews.make(f"step-{done}", done, lambda: stopping.reason() is not None)
        reason = agreed(state.accelerator, stopping.reason())
        is_point = done % run.checkpointing_steps == 0
        if holdout is not None and reason is None and (is_point or done == state.end):
            holdout.measure(done)
        is_asked = is_point or reason is not None
        if previews is not None and (state.run.takes_save_request() or is_asked):
            save_checkpoint(state, done)
        if reason is not None and done < state.end:
            if previews is not None:
                state.run.add_event({"event": "stopped", "step": done, "reason": reason})
            raise StoppedError(f"stopped after step {done} by {reason}; --resume_from_checkpoint latest goes on")
        if is_point and state.config.data.holdout_patience and agreed(state.accelerator, _enough(holdout)) is not None:
            logger.info("step %d is the last: the loss of the held-out images falls no more", done)
            return done
    return state.end


def _enough(holdout: Holdout | None) -> str | None:
    return "the held-out images" if holdout is not None and holdout.is_over() else None


def _log(state: TrainState, step: int, loss: float, lr: float, seconds: float, eta: float) -> dict[str, str]:
    """Add the event of a step, tell the trackers, and return what the progress bar shows."""
    sigma = state.gradient.sigma_at(step)
    rise = {} if state.progress.rise is None else {"rise": state.progress.rise.found}
    state.run.add_event(
        {
            "event": "step",
            "step": step,
            "loss": loss,
            **rise,
            "lr": lr,
            "sigma": sigma,
            "draws": state.progress.draws,
            "seconds": round(seconds, 4),
            "eta": round(eta, 1),
            "memory": memory_in_use(state.accelerator.device),
        }
    )
    tell_trackers(state.accelerator, {"loss": loss, **rise, "lr": lr, "sigma": sigma}, step)
    return {"loss": f"{loss:.4f}", **{name: f"{value:.1%}" for name, value in rise.items()}, "sigma": f"{sigma:.3f}"}
