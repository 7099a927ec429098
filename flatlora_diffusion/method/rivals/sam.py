"""Sharpness-aware minimization (SAM, arXiv:2010.01412): the gradient at weights that increase the loss most.

    eps = rho * g / ||g||,  g the gradient at the weights;  the step descends along the gradient at weights + eps

Two passes with the same noise and timesteps. LoRA-SAM perturbs A and B. SAM perturbs W of all adapted layers along a
low-rank sketch of g, so that eps is as small as a LoRA. Norms are over all layers. The reported loss is that at the
unperturbed weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flatlora_diffusion.method.gradient import Ascent, GradientInputs, MicroBatch, StepGradient, weights_shifted
from flatlora_diffusion.method.layers import AdaptedLayer
from flatlora_diffusion.method.rivals.sketch import Sketches
from flatlora_diffusion.method.rivals.weight_gradients import WeightGradientHook, average, norm


def lora_sam_gradient(inputs: GradientInputs) -> LoraSam:
    """Build SAM over the factors of all models."""
    return LoraSam(list(inputs.trainable.values()), inputs.factors, inputs.config.effective_rho)


def sam_gradient(inputs: GradientInputs) -> Sam:
    """Build SAM over the adapted W of all models."""
    return Sam(inputs.models.values(), list(inputs.trainable.values()), inputs.config.effective_rho, inputs.seed)


def meta_passes(model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
    """Run the passes of a step on meta tensors, which have no norms, for the memory estimate."""
    method = Sam([model], [], rho=1.0, seed=0)
    with method.recording(Sketches(0, 0)) as sketches:
        for batch in micro_batches:
            batch.backward()
    with method.perturbed(sketches):
        for batch in micro_batches:
            batch.backward()
    method.detach()


class LoraSam(StepGradient):
    """SAM over A and B: it perturbs W only within the subspace of the LoRA (arXiv:2409.14396, Eq. 4)."""

    ascends = True

    def __init__(self, trainable: Sequence[nn.Parameter], factors: Sequence[nn.Parameter], rho: float) -> None:
        self._trainable, self._factors, self._rho = trainable, factors, rho

    def compute(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        batches, self.ascent = list(micro_batches), None
        losses = [batch.backward() for batch in batches]
        grads = {factor: factor.grad for factor in self._factors if factor.grad is not None}
        length = norm(grads.values())
        if not _can_ascend(length):
            return losses
        with weights_shifted({factor: grad * (self._rho / length) for factor, grad in grads.items()}):
            _zero_grads(self._trainable)
            self.ascent = Ascent([batch.backward() for batch in batches], self._rho * length)
        return losses


class Sam(WeightGradientHook, StepGradient):
    """SAM over W of the adapted layers. Their forward adds eps, so W is not written.

    Args:
        models: the adapted models.
        trainable: all trained parameters.
        rho: Frobenius norm of eps over all layers.
        seed: seed of the gradient sketches.
    """

    ascends = True

    def __init__(self, models: Iterable[nn.Module], trainable: Sequence[nn.Parameter], rho: float, seed: int) -> None:
        super().__init__(models)
        self._trainable, self._rho, self._seed = trainable, rho, seed
        self._eps: Sketches | None = None

    def compute(self, step: int, micro_batches: Iterable[MicroBatch]) -> list[Tensor]:
        batches, self.ascent = list(micro_batches), None
        sketches = Sketches(self._seed, step)
        sketches.sample_projections(self.layers)
        with self.recording(sketches):
            losses = [batch.backward(is_shared=False) for batch in batches]
        sketches.average()
        length = sketches.norm()
        if not _can_ascend(length):
            # The first pass has not averaged the gradients over processes, and there is no second pass.
            average(weight.grad for weight in self._trainable if weight.grad is not None)
            return losses
        sketches.scale(self._rho / length)
        _zero_grads(self._trainable)
        with self.perturbed(sketches):
            self.ascent = Ascent([batch.backward() for batch in batches], self._rho * length)
        return losses

    @contextmanager
    def perturbed(self, eps: Sketches) -> Iterator[None]:
        """Compute the adapted layers at W + eps while open."""
        self._eps = eps
        try:
            yield
        finally:
            self._eps = None

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        factors = None if self._eps is None else self._eps.factors(layer)
        if factors is None:
            return super()._base_forward(layer, x, *args, **kwargs)
        down, up = factors

        def noise_output(x: Tensor) -> Tensor:
            return layer.apply_frozen_factors(down.to(x.dtype), up.to(x.dtype), x)

        return layer.add_to_base_output(noise_output, x, *args, **kwargs)


def _zero_grads(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _can_ascend(length: Tensor) -> bool:
    """Whether the gradient has a direction. The training loop handles a gradient that is not finite."""
    return 0 < float(length) < math.inf  # read once, because each read waits for the device
