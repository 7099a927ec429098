"""Following an optimizer: eps comes with the first training forward and goes with the optimizer's step.

A loop needs no other change: the step is counted by a step hook of torch, and whether a forward is one of training is
each layer's own `training`, which `model.train()` and `model.eval()` set. One eps serves all forwards of a step, as in
the paper, so that accumulation, several forwards for one loss and recomputation in backward all see the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.method.draw import Draw
from flatlora_diffusion.method.layers import AdaptedLayer, is_sharded

_BY_HAND = "run forward and backward inside `with flat.perturb(step):` instead"


class Following:
    """The eps of optimizer step `step`, drawn by `draw_at(step)` when a layer in training mode first asks for it."""

    def __init__(self, layers: Mapping[str, AdaptedLayer], draw_at: Callable[[int], Draw | None]) -> None:
        self.step = 0
        self._layers, self._draw_at = layers, draw_at
        self._hook: Any = None
        self._drawn: tuple[int, Draw | None] | None = None  # of which step, and its eps

    @property
    def is_on(self) -> bool:
        return self._hook is not None

    def start(self, optimizer: Optimizer | None) -> None:
        """Follow `optimizer`, or whichever steps the LoRA. Raises ConfigError where eps could not act as it should."""
        if self.is_on:
            raise ConfigError("this FlatLora follows an optimizer already; detach it and make a new one for another")
        for name, layer in self._layers.items():
            if any(is_sharded(one) or hasattr(one, "ds_id") for one in layer.tuner.parameters()):
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

    def draw(self, layer: AdaptedLayer) -> Draw | None:
        """What `layer` computes with now: the step's eps while it is in training mode."""
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
                f"the optimizer made step {self.step} and no perturbed layer ran in training mode before it: call "
                f"model.train() before the forward, or {_BY_HAND}"
            )
        self.step += 1
        self._drawn = None

    def _check_parameters(self, optimizer: Optimizer) -> None:
        stepped = _stepped(optimizer)
        if not self._trained() & stepped:
            raise ConfigError(
                f"the optimizer steps none of the LoRA's {len(self._trained())} trainable parameters; follow the one "
                "that was made from this model's parameters with requires_grad"
            )
        for name, layer in self._layers.items():
            if id(layer.base.weight) in stepped:
                raise ConfigError(f"the optimizer steps W of {name}, which has to stay frozen; leave it out")

    def _trained(self) -> set[int]:
        """The LoRA's trainable parameters, by identity."""
        bases = {id(one) for layer in self._layers.values() for one in layer.base.parameters()}
        tuned = (one for layer in self._layers.values() for one in layer.tuner.parameters())
        return {id(one) for one in tuned if one.requires_grad} - bases


def _innermost(optimizer: Optimizer) -> Optimizer:
    """torch's own object below wrappers such as accelerate's, which has the hooks."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        kind = type(optimizer).__name__
        raise ConfigError(f"follow() needs a torch.optim.Optimizer, not {kind}; {_BY_HAND}")
    return optimizer


def _stepped(optimizer: Optimizer) -> set[int]:
    parameters: list[nn.Parameter] = [one for group in optimizer.param_groups for one in group["params"]]
    return {id(one) for one in parameters}
