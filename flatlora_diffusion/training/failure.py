"""What is kept and said of a run that fails: the weights of its last whole step, with which it can go on."""

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
from flatlora_diffusion.training.checkpoint import save_checkpoint, save_state
from flatlora_diffusion.training.state import TrainState
from flatlora_diffusion.training.stopping import interrupted_as

logger = logging.getLogger(__name__)


@contextmanager
def explained(config: TrainConfig) -> Iterator[None]:
    """Raises RunError in place of an error of PyTorch that a setting can mend."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RunError(_what_lowers_it(config)) from error
    except RuntimeError as error:
        operation, is_found, _ = str(error).partition(" does not have a deterministic implementation")
        if not is_found:
            raise
        raise RunError(f"{operation} has no deterministic kernel on this device; leave --deterministic out") from error


def _what_lowers_it(config: TrainConfig) -> str:
    """What a run says that is out of memory. Where the estimate fails, that is not what it failed of."""
    from flatlora_diffusion.memory.estimate import out_of_memory_text  # slow to import, and needed only here

    try:
        return out_of_memory_text(config)
    except Exception as error:
        logger.warning("the memory that the run needs could not be estimated: %s", error)
        return (
            "the device is out of memory; lower --train_batch_size or --resolution, or give "
            "--gradient_checkpointing, --cache_latents or --offload"
        )


@contextmanager
def kept(state: TrainState) -> Iterator[None]:
    """Save the weights when what goes on while this is open fails, and have the error say so.

    An interruption saves nothing: whoever presses Ctrl-C a second time wants to be out.
    """
    try:
        with interrupted_as(lambda: f"at once; {state.run.last_checkpoint_text()}"):
            yield
    except (ConfigError, StoppedError):
        raise
    except Exception as error:
        found = _keep(state)
        if not isinstance(error, RunError):
            logger.warning("%s", found)
            raise
        raise RunError(f"{error}{'; ' if len(str(error).splitlines()) == 1 else chr(10)}{found}") from error


def _keep(state: TrainState) -> str:
    """Save what the last whole step has left unless that is saved; returns what there is to go on from, in words."""
    step, run = state.progress.steps_done, state.run
    if state.accelerator.is_main_process and step and _is_finite(state):
        names = [path.name for path in run.checkpoints()]
        try:
            if f"checkpoint-{step}" not in names:
                _save(state, step)
            return (
                f"checkpoint-{step} has the weights before that, and --resume_from_checkpoint latest goes on from it"
            )
        except Exception as error:  # why the run ends is what matters
            logger.warning("the weights after step %d could not be saved: %s", step, error)
    return run.last_checkpoint_text()


def _save(state: TrainState, step: int) -> None:
    """A checkpoint; no older one goes for it. What does not fit into --save_dtype fits into fp32."""
    config = state.config.replace(save_dtype="fp32", checkpoints_total_limit=None)
    roomy = replace(state, progress=replace(state.progress, config=config))
    try:
        save_checkpoint(roomy, step)
    except RunError:  # without a LoRA file to look at it is still one to go on from
        with state.run.new_checkpoint(step, limit=None) as folder:
            save_state(state, folder, step)
        state.run.add_event({"event": "checkpoint", "step": step})


def _is_finite(state: TrainState) -> bool:
    """Whether a run could go on from its weights and from what its method has beside them."""
    tensors = (*state.trainable.values(), *state.gradient.state()[0].values())
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def non_finite_slots(state: TrainState, losses: list[Tensor]) -> list[int]:
    """The micro-batches, of all processes, whose loss is not finite; `losses` are this process's."""
    by_rank = state.accelerator.gather(torch.stack(losses)).view(state.accelerator.num_processes, len(losses))
    return [slot for slot, loss in enumerate(by_rank.T.flatten().tolist()) if not math.isfinite(loss)]


def non_finite_text(state: TrainState, step: int, what: str, slots: list[int]) -> str:
    """What a run says whose loss or gradient is not finite: in which step, with which images, and what to change."""
    places = [(state.batches.samples_at(step, slot), state.batches.batch(step, slot).latents) for slot in slots]
    spoiled = [name for samples, latents in places for name in nonfinite_names(latents, samples)]
    if spoiled:
        return nonfinite_message(spoiled)
    names = [sample.id for samples, _ in places for sample in samples]
    advice = {
        "fp16": "go on with --mixed_precision bf16",
        "bf16": "go on with a lower --learning_rate",
        "no": "go on with a lower --learning_rate",
    }[str(state.config.optim.mixed_precision)]
    return f"the {what} of step {step} is not finite with these images: {', '.join(names)}; {advice}"
