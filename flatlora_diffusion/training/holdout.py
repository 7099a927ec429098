"""The loss of held-out images at each checkpoint, and the end of a run that no longer lowers it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from flatlora_diffusion.adapter.new_tokens import replace_in_captions
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss, with_prompts
from flatlora_diffusion.families.sampling import eval_on_denoiser_device
from flatlora_diffusion.training.checkpoint import best_step
from flatlora_diffusion.training.state import TrainState, ema_weights

logger = logging.getLogger(__name__)


class HeldoutLoss:
    """The loss of fixed images at fixed noise and timesteps, with the run's text encoders."""

    def __init__(self, state: TrainState, samples: Sequence[Sample]) -> None:
        self._state = state
        samples = replace_in_captions(samples, state.tokens)
        self._captions = [sample.caption for sample in samples]
        with eval_on_denoiser_device(state.base):
            self._probe = fixed_probe(
                state.base, samples, state.batches.resolution, seed=0, background=state.config.data.background_color
            )

    def now(self) -> float:
        """The loss of the present weights."""
        state = self._state
        if state.config.trains_text:  # the prompts' embeddings change with the encoders
            with eval_on_denoiser_device(state.base):
                self._probe = with_prompts(self._probe, state.base, self._captions)
        return probe_loss(state.base.denoiser, state.objective.unweighted(), self._probe)


class Holdout:
    """Measures the loss of --holdout_images at each checkpoint and adds it to the run's events."""

    def __init__(self, state: TrainState, samples: Sequence[Sample], first: int) -> None:
        """Measure the checkpoint `first` that a run resumes from, if the run was stopped before it was measured."""
        self._state = state
        self._loss = HeldoutLoss(state, samples)
        at_checkpoint = first > 0 and first % state.config.run.checkpointing_steps == 0
        if at_checkpoint and first not in state.run.holdout_losses():
            self.measure(first)

    def measure(self, step: int) -> None:
        """Measure the weights that are saved after `step` steps."""
        with ema_weights(self._state):
            loss = self._loss.now()
        self._state.run.add_event({"event": "holdout", "step": step, "loss": loss})
        logger.info("held-out loss after %d steps: %.4f", step, loss)

    def is_over(self) -> bool:
        """Whether the loss has not fallen for --holdout_patience checkpoints."""
        patience, losses = self._state.config.data.holdout_patience, self._state.run.holdout_losses()
        return bool(losses) and 0 < patience <= sum(step > best_step(losses) for step in losses)
