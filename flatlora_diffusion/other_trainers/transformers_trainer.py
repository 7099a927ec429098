"""Flat-LoRA in `transformers.Trainer` and its subclasses, such as TRL's trainers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.noise_config import NoiseConfig


class FlatLoraCallback(TrainerCallback):
    """Trains the LoRA of the trainer's model as Flat-LoRA: `Trainer(model, ..., callbacks=[FlatLoraCallback()])`.

    The ramp of sigma ends with the trainer's last step, and a resumed training goes on where it was. Evaluation and
    all that is saved are without eps.

    Args:
        seed: seed of eps; the trainer's by default.
        settings: settings of `NoiseConfig` but `total_steps`, which is the trainer's number of steps.

    Raises:
        ConfigError: a setting out of range.
    """

    def __init__(self, seed: int | None = None, **settings: Any) -> None:
        self._noise, self._seed = NoiseConfig(**settings), seed
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
        self._flat = FlatLora(kwargs["model"], self._noise, total_steps=state.max_steps, seed=seed)
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
