"""Perturbation of an unchanged training loop: a new eps after each optimizer step.

A step hook of torch counts the steps, and the `training` flag of each layer, which `model.train()` and `model.eval()`
set, turns eps on and off. All forwards of a step share an eps, as in the paper, so that accumulation, several forwards
per loss and recomputation in backward have the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.method.draw import Draw
from flatlora_diffusion.method.layers import AdaptedLayer, is_sharded

_BY_HAND = "run forward and backward inside `with flat.perturb(step):` instead"


class OptimizerHook:
    """The current optimizer step and its eps; `draw_at(step)` is called in the first training forward of a step."""

    def __init__(self, layers: Mapping[str, AdaptedLayer], draw_at: Callable[[int], Draw | None]) -> None:
        self.step = 0
        self._layers, self._draw_at = layers, draw_at
        self._hook: Any = None
        self._drawn: tuple[int, Draw | None] | None = None  # step and its eps

    @property
    def is_active(self) -> bool:
        return self._hook is not None

    def start(self, optimizer: Optimizer | None) -> None:
        """Follow `optimizer`, or any optimizer of the LoRA if None.

        Raises:
            ConfigError: see `FlatLora.follow`.
        """
        if self.is_active:
            raise ConfigError("this FlatLora already follows an optimizer; detach it and create a new one")
        for name, layer in self._layers.items():
            if any(is_sharded(weight) or hasattr(weight, "ds_id") for weight in layer.tuner.parameters()):
                raise ConfigError(f"{name} is sharded (FSDP, ZeRO-3, tensor parallel), which follow() cannot perturb")
        if optimizer is None:
            self._hook = register_optimizer_step_post_hook(self._after_any_step)
            return
        optimizer = _innermost(optimizer)
        self._check_parameters(optimizer)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._drawn = None

    def current_draw(self, layer: AdaptedLayer) -> Draw | None:
        """Return the eps of the step for a layer in training mode, None in evaluation mode."""
        if not layer.tuner.training:
            return None
        if self._drawn is None or self._drawn[0] != self.step:
            self._drawn = self.step, self._draw_at(self.step)
        return self._drawn[1]

    def _after_any_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._trained() & _stepped(optimizer):
            self._after_step()

    def _after_step(self, *_: Any) -> None:
        if self._drawn is None or self._drawn[0] != self.step:
            raise ConfigError(
                f"optimizer step {self.step} came without a forward of a perturbed layer in training mode: call "
                f"model.train() before the forward, or {_BY_HAND}"
            )
        self.step += 1
        self._drawn = None

    def _check_parameters(self, optimizer: Optimizer) -> None:
        stepped = _stepped(optimizer)
        if not self._trained() & stepped:
            raise ConfigError(
                f"the optimizer has none of the {len(self._trained())} trainable parameters of the LoRA; follow the "
                "optimizer that was created with the parameters of this model"
            )
        for name, layer in self._layers.items():
            if id(layer.base.weight) in stepped:
                raise ConfigError(
                    f"the optimizer trains W of {name}, which must stay frozen; remove it from the optimizer"
                )

    def _trained(self) -> set[int]:
        """Return the ids of the trainable parameters of the LoRA."""
        bases = {id(weight) for layer in self._layers.values() for weight in layer.base.parameters()}
        tuned = (weight for layer in self._layers.values() for weight in layer.tuner.parameters())
        return {id(weight) for weight in tuned if weight.requires_grad} - bases


def _innermost(optimizer: Optimizer) -> Optimizer:
    """Return the torch optimizer inside wrappers such as accelerate's; it runs the hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise ConfigError(f"follow() needs a torch.optim.Optimizer, not {kind}; {_BY_HAND}")
    return optimizer


def _stepped(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
