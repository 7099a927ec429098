"""Failures of a run: the weights of the last complete step are saved, and the error suggests a setting to change."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from flatlora_diffusion.config import ConfigError, RunError, StoppedError, TrainConfig
from flatlora_diffusion.data.latents import nonfinite_message, nonfinite_names
from flatlora_diffusion.families.device import has_bf16
from flatlora_diffusion.signals import describe_interruption
from flatlora_diffusion.training.checkpoint import save_checkpoint, save_state
from flatlora_diffusion.training.state import TrainState

logger = logging.getLogger(__name__)


@contextmanager
def friendly_errors(config: TrainConfig) -> Iterator[None]:
    """Raise RunError in place of errors of PyTorch that a setting can avoid."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(_out_of_memory_text(config)) from error
    except RuntimeError as error:
        operation, marker, _ = str(error).partition(" does not have a deterministic implementation")
        if not marker:
            raise
        raise RunError(f"{operation} has no deterministic kernel on this device; leave --deterministic out") from error


def _out_of_memory_text(config: TrainConfig) -> str:
    from flatlora_diffusion.memory.estimate import out_of_memory_text  # slow to import

    try:
        return out_of_memory_text(config)
    except Exception as error:  # the run failed for lack of memory, not because of the estimate
        logger.warning("the run's memory could not be estimated: %s", error)
        return (
            "the device is out of memory; lower --train_batch_size or --resolution, or give "
            "--gradient_checkpointing, --cache_latents or --offload"
        )


@contextmanager
def save_on_failure(state: TrainState) -> Iterator[None]:
    """Save the weights if the block fails, and name the checkpoint in the error.

    An interruption saves nothing: a second Ctrl-C means to end immediately.
    """
    try:
        with describe_interruption(lambda: f"at once; {state.run.last_checkpoint_text()}"):
            yield
    except (ConfigError, StoppedError):
        raise
    except Exception as error:
        checkpoint = _save_last_step(state)
        if not isinstance(error, RunError):
            logger.warning("%s", checkpoint)
            raise
        separator = "; " if len(str(error).splitlines()) == 1 else "\n"
        raise RunError(f"{error}{separator}{checkpoint}") from error


def _save_last_step(state: TrainState) -> str:
    """Save the weights of the last complete step unless they are saved; return which checkpoint to resume from."""
    step, run = state.progress.steps_done, state.run
    if state.accelerator.is_main_process and step and _is_finite(state):
        names = [path.name for path in run.checkpoints()]
        try:
            if f"checkpoint-{step}" not in names:
                _save_checkpoint(state, step)
            return f"checkpoint-{step} has the weights before the failure; --resume_from_checkpoint latest resumes it"
        except Exception as error:  # must not hide the first error
            logger.warning("the weights after step %d could not be saved: %s", step, error)
    return run.last_checkpoint_text()


def _save_checkpoint(state: TrainState, step: int) -> None:
    """Save a checkpoint without deleting an older one; in fp32, because values may overflow in --save_dtype."""
    config = state.config.replace(save_dtype="fp32", checkpoints_total_limit=None)
    state = replace(state, progress=replace(state.progress, config=config))
    try:
        save_checkpoint(state, step)
    except RunError:  # the state can be resumed even if its LoRA file cannot be written
        with state.run.new_checkpoint(step, limit=None) as folder:
            save_state(state, folder, step)
        state.run.add_event({"event": "checkpoint", "step": step})


def _is_finite(state: TrainState) -> bool:
    """Whether all weights and tensors of the method are finite, so that the run can be resumed."""
    tensors = (*state.trainable.values(), *state.gradient.state()[0].values())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def non_finite_slots(state: TrainState, losses: list[Tensor]) -> list[int]:
    """The slots whose loss is not finite, of all processes; `losses` are those of this process's micro-batches."""
    by_rank = state.accelerator.gather(torch.stack(losses)).view(state.accelerator.num_processes, len(losses))
    return [slot for slot, loss in enumerate(by_rank.T.flatten().tolist()) if not math.isfinite(loss)]


def non_finite_text(state: TrainState, step: int, quantity: str, slots: list[int]) -> str:
    """The error message for a loss or gradient (`quantity`) that is not finite, with the images of these slots."""
    micro_batches = [(state.batches.samples_at(step, slot), state.batches.batch(step, slot).latents) for slot in slots]
    bad_latents = [name for samples, latents in micro_batches for name in nonfinite_names(latents, samples)]
    if bad_latents:
        return nonfinite_message(bad_latents)
    names = [sample.id for samples, _ in micro_batches for sample in samples]
    advice = {
        "fp16": f"resume with --mixed_precision {'bf16' if has_bf16(state.accelerator.device) else 'no'}",
        "bf16": "resume with a lower --learning_rate",
        "no": "resume with a lower --learning_rate",
    }[str(state.config.optim.mixed_precision)]
    return f"the {quantity} of step {step} is not finite with these images: {', '.join(names)}; {advice}"
