"""Flat-LoRA in `transformers.Trainer` and its subclasses, such as TRL's trainers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flatlora_diffusion.config import ConfigError, DrawKind, NoiseKind, SigmaSchedule
from flatlora_diffusion.method.flat_lora import FlatLora


class FlatLoraCallback(TrainerCallback):
    """Trains the LoRA of the trainer's model as Flat-LoRA: `Trainer(model, ..., callbacks=[FlatLoraCallback()])`.

    The schedule of sigma ends with the trainer's last step, and a resumed training continues it. Evaluation and saved
    weights are not perturbed.

    Args:
        sigma: Strength of the noise relative to each filter's norm, as in `FlatLora`.
        schedule: How sigma grows over the training, as in `FlatLora`.
        seed: Seed of the noise; None for the trainer's seed.
        noise: Kind of noise, as in `FlatLora`.
        draw: How the noise is sampled, as in `FlatLora`.
        norm_every: Steps between updates of the filter norms, as in `FlatLora`.
    """

    def __init__(
        self,
        sigma: float = 0.05,
        schedule: SigmaSchedule = "cosine",
        seed: int | None = None,
        noise: NoiseKind = "filter",
        draw: DrawKind = "low_rank",
        norm_every: int = 1,
    ) -> None:
        self._settings: dict[str, Any] = {
            "sigma": sigma,
            "schedule": schedule,
            "noise": noise,
            "draw": draw,
            "norm_every": norm_every,
        }
        self._seed = seed
        self._flat: FlatLora | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model. Raises ConfigError for a model without LoRA, and if Flat-LoRA cannot work with it."""
        if args.n_gpu > 1:
            raise ConfigError(
                f"the trainer copies the model to {args.n_gpu} GPUs in one process, which Flat-LoRA does not support; "
                "start it with `accelerate launch` or torchrun, or select a GPU with CUDA_VISIBLE_DEVICES"
            )
        self._detach()  # from an earlier training that failed
        seed = args.seed if self._seed is None else self._seed
        self._flat = FlatLora(kwargs["model"], total_steps=state.max_steps, seed=seed, **self._settings)
        self._flat.follow(kwargs["optimizer"])

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._flat is not None:
            self._flat.step = state.global_step  # also after resuming, and after a step skipped by a scaler

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._flat is not None:
            self._flat.detach()
        self._flat = None
