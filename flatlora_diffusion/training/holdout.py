"""When a run has learned enough: the loss of images that it does not train on, at each checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flatlora_diffusion.adapter.new_tokens import in_captions
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss, with_prompts
from flatlora_diffusion.sdxl.objective import unweighted
from flatlora_diffusion.sdxl.sampling import eval_on_unet_device
from flatlora_diffusion.training.checkpoint import best_step
from flatlora_diffusion.training.state import TrainState, averaged

logger = logging.getLogger(__name__)


class HeldoutLoss:
    """The loss of fixed images with noise and timesteps that never change, as the run's text encoders read them."""

    def __init__(self, state: TrainState, samples: Sequence[Sample]) -> None:
        self._state = state
        read = in_captions(samples, state.tokens)
        self._captions = [sample.caption for sample in read]
        with eval_on_unet_device(state.sdxl):
            self._probe = fixed_probe(
                state.sdxl, read, state.batches.resolution, seed=0, background=state.config.data.background_color
            )

    def now(self) -> float:
        state = self._state
        if state.config.trains_text:  # each time has encoders of its own
            with eval_on_unet_device(state.sdxl):
                self._probe = with_prompts(self._probe, state.sdxl, self._captions)
        return probe_loss(state.sdxl.unet, unweighted(state.objective), self._probe)


class Holdout:
    """Measures --holdout_images at each checkpoint; the figures are events of the run."""

    def __init__(self, state: TrainState, samples: Sequence[Sample], first: int) -> None:
        """Measures the checkpoint that a run goes on from, after `first` steps, if a stop left no time for it."""
        self._state = state
        self._loss = HeldoutLoss(state, samples)
        is_point = first > 0 and first % state.config.run.checkpointing_steps == 0
        if is_point and first not in state.run.holdout_losses():
            self.measure(first)

    def measure(self, step: int) -> None:
        """The loss after `step` steps, of what would be saved."""
        with averaged(self._state):
            loss = self._loss.now()
        self._state.run.add_event({"event": "holdout", "step": step, "loss": loss})
        logger.info("loss of the held-out images after %d steps: %.4f", step, loss)

    def is_over(self) -> bool:
        """Whether the loss has not fallen for as many checkpoints as --holdout_patience waits for."""
        patience, losses = self._state.config.data.holdout_patience, self._state.run.holdout_losses()
        return bool(losses) and 0 < patience <= sum(step > best_step(losses) for step in losses)
