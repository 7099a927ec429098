"""Flat-LoRA (arXiv:2409.14396): train LoRA on the expected loss E[L(W + sBA + eps)] without writing to W.

Eq. 7 of the paper, for a layer with m filters (rows) of n inputs and merged weight W' = W + sBA:

    eps[i, j] ~ N(0, sigma^2 / n * ||W'[i]||^2)

The reference code adds eps to W in place and subtracts it later, so half-precision weights drift, and it reseeds the
global generator. Here eps exists only inside the op of the layer and comes from a private generator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from operator import is_
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.method.draw import Draw, DrawKey
from flatlora_diffusion.method.layers import AdaptedLayer, find_adapted_layers
from flatlora_diffusion.method.noise_config import NoiseConfig, check_int, check_sigma
from flatlora_diffusion.method.optimizer_hook import OptimizerHook
from flatlora_diffusion.method.row_norms import NormState, RowStdCache, RowStds, merged_square_norms


class FlatLora:
    """Perturbs every LoRA layer of `model` while `perturb` is open, or in each training forward after `follow`.

    Args:
        model: any module with PEFT LoRA layers (a UNet after `add_adapter`, a `get_peft_model` result).
        config: size, schedule and kind of the noise.
        settings: fields of `NoiseConfig` that override `config`.

    Raises:
        ConfigError: a setting is out of range, the model has no LoRA layer, or adapted layers cannot be perturbed
            (named).
    """

    def __init__(self, model: nn.Module, config: NoiseConfig | None = None, **settings: Any) -> None:
        config = replace(config or NoiseConfig(), **settings)
        self._model = model
        self._adapters = _adapter_configs(model)
        self._is_open = False
        self._draw: Draw | None = None
        self._disabled = 0
        self._layers = {layer.name: layer for layer in find_adapted_layers(model)}
        for layer in self._layers.values():
            layer.base_hook.attach(partial(self._base_forward, layer))
        self._optimizer_hook = OptimizerHook(self._layers, self._draw_at)
        self._configure(config)

    @property
    def layers(self) -> Mapping[str, BaseTunerLayer]:
        """The perturbed PEFT layers by module path, without the prefixes of PEFT, DDP and torch.compile."""
        return {name: layer.tuner for name, layer in self._layers.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes of state between steps: the squared row norms of each frozen W (host memory) and the cached standard
        deviations of the rows.
        """
        return self._norms.nbytes + sum(layer.base_square_norms.nbytes for layer in self._layers.values())

    def sigma_at(self, step: int) -> float:
        """Return sigma at the 0-based optimizer `step`; it is constant from `total_steps` on."""
        return self.config.sigma_at(step)

    @property
    def step(self) -> int:
        """The current 0-based optimizer step after `follow`."""
        return self._optimizer_hook.step

    @step.setter
    def step(self, step: int) -> None:
        check_int("step", step, 0)
        self._optimizer_hook.step = step

    def follow(self, optimizer: Optimizer | None = None) -> None:
        """Perturb every training forward until `detach`, with a new eps after each step of `optimizer`.

        The training loop stays as it is: `model.train()` turns eps on and `model.eval()` turns it off. Accumulated
        micro-batches and DDP processes share the eps of a step. `state_dict` then contains the step.

        Args:
            optimizer: the optimizer of the LoRA; None for any optimizer that trains it.

        Raises:
            ConfigError: `optimizer` does not train the LoRA, trains W or is not torch's, or layers are sharded. Also
                raised by an optimizer step without a forward in training mode.
        """
        self._check_usable()
        self._optimizer_hook.start(optimizer)

    @contextmanager
    def perturb(self, step: int, slot: int = 0, sigma: float | None = None) -> Iterator[None]:
        """Compute the layers at W + eps while the context is open; run forward AND backward inside.

        Gradient checkpointing works: the recomputed forward has the same eps.

        Args:
            step: 0-based optimizer step.
            slot: micro_batch * world_size + rank.
            sigma: overrides the schedule.

        Raises:
            ConfigError: an argument is out of range, or adapters were added or removed since the construction.
        """
        self._check_usable()
        check_int("step", step, 0)
        check_int("slot", slot, 0)
        if self._is_open:
            raise RuntimeError("perturb() is already open; close it before opening it again")
        if self._optimizer_hook.is_active:
            raise RuntimeError("this FlatLora follows an optimizer; use either follow() or perturb(), not both")
        self._draw = self._draw_at(step, slot, sigma)
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            self._draw = None

    @contextmanager
    def frozen_norms(self) -> Iterator[None]:
        """Compute ||W'_i|| once per step while open, for several `perturb` calls with unchanged A and B."""
        with self._norms.freeze():
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Turn eps off while open, even inside `perturb`: for sampling and evaluation."""
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def noise(self, name: str, step: int, slot: int = 0, sigma: float | None = None) -> Tensor:
        """Return the eps of layer `name` in `perturb(step, slot, sigma)`: fp32, shape of W."""
        layers = [self._layer(name)] if not self.config.draws.shares_seed else self._layers.values()
        with _exact():
            norms = self._norms.peek(step, layers)
            return self._make_draw(norms, step, slot, self._effective_sigma(step, sigma)).noise(name)

    def filter_norms(self, name: str) -> Tensor:
        """Return the row norms ||W'[i]||_2 of the merged weight W' = W + sBA of layer `name`: (m,) fp32."""
        with _exact():
            ((_, square_norms),) = merged_square_norms([self._layer(name)])
            return square_norms[0].sqrt()

    def state_dict(self) -> dict[str, Any]:
        """Return the settings, JSON-serializable, with which a resumed run has the same eps."""
        return asdict(self.config) | ({"step": self.step} if self._optimizer_hook.is_active else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Use the settings of a `state_dict`.

        Raises:
            ConfigError: a key is missing or unknown.
        """
        settings = dict(state)
        step = settings.pop("step", self.step)
        check_int("step", step, 0)
        self._configure(NoiseConfig.from_state(settings))
        self.step = step

    def norm_state(self) -> NormState | None:
        """Return the cached norms, which a run resumed inside an interval of `norm_every` steps needs; else None."""
        return self._norms.state()

    def load_norm_state(self, state: NormState) -> None:
        """Use the norms of a `norm_state`."""
        self._norms.load(state)

    def detach(self) -> None:
        """Restore the model. The object cannot be used afterwards."""
        self._optimizer_hook.stop()
        for layer in self._layers.values():
            layer.layer_hook.restore()
            layer.base_hook.restore()
        self._layers = {}

    def _configure(self, config: NoiseConfig) -> None:
        self.config = config
        self._norms = RowStdCache(self._layers, config.norm_every, config.noise)
        for layer in self._layers.values():
            layer.layer_hook.restore()
            if layer.fusable_factors and config.draws.fuses_with_lora:
                layer.layer_hook.attach(partial(self._layer_forward, layer))

    def _check_usable(self) -> None:
        if not self._layers:
            raise RuntimeError("this FlatLora was detached; create a new one")

    def _check_all_attached(self) -> None:
        adapters = _adapter_configs(self._model)
        if adapters and len(adapters) == len(self._adapters) and all(map(is_, adapters, self._adapters)):
            return  # the same adapters as before, so the modules need no check
        perturbed = {id(layer.tuner) for layer in self._layers.values()}
        tuners = {id(module) for module in self._model.modules() if isinstance(module, BaseTunerLayer)}
        if tuners != perturbed or any(layer.adapters_changed() for layer in self._layers.values()):
            raise ConfigError(
                "adapters were added or removed after FlatLora was created; detach it and create a new one"
            )
        self._adapters = adapters

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replace the forward of a base layer."""
        draw = self._active_draw(layer)
        if draw is None:
            return layer.base_hook.forward(x, *args, **kwargs)
        return draw.base_output(layer, x, *args, **kwargs)

    def _layer_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Replace the forward of a PEFT layer."""
        draw = None if args or kwargs else self._active_draw(layer)
        output = None if draw is None else draw.layer_output(layer, x)
        return layer.layer_hook.forward(x, *args, **kwargs) if output is None else output

    def _active_draw(self, layer: AdaptedLayer) -> Draw | None:
        """Return the current eps of `layer`, or None."""
        if self._disabled:
            return None
        return self._optimizer_hook.current_draw(layer) if self._optimizer_hook.is_active else self._draw

    def _draw_at(self, step: int, slot: int = 0, sigma: float | None = None) -> Draw | None:
        """Return the eps of a step and slot for the current norms of W'; None if sigma is 0."""
        self._check_all_attached()
        sigma = self._effective_sigma(step, sigma)
        if sigma == 0:
            return None
        with _exact():
            return self._make_draw(self._norms.get(step), step, slot, sigma)

    def _make_draw(self, stds: Sequence[RowStds], step: int, slot: int, sigma: float) -> Draw:
        key = DrawKey(self.config.seed, self.config.prefix, step, slot)
        return self.config.draws(self._layers, stds, sigma, key)

    def _effective_sigma(self, step: int, sigma: float | None) -> float:
        if sigma is None:
            return self.sigma_at(step)
        check_sigma(sigma)
        return float(sigma)

    def _layer(self, name: str) -> AdaptedLayer:
        if name not in self._layers:
            raise KeyError(f"no perturbed layer {name!r}; FlatLora.layers has the names of all {len(self._layers)}")
        return self._layers[name]


def _adapter_configs(model: nn.Module) -> list[object]:
    """Return `peft_config` of PEFT and diffusers models and its values; empty for other models."""
    configs = getattr(model, "peft_config", None)
    return [] if configs is None else [configs, *configs.values()]


@contextmanager
def _exact() -> Iterator[None]:
    """Disable gradients and autocast on all devices."""
    # Backward may need the results, so they must not be inference tensors. Leaving inference mode enables gradients,
    # so no_grad comes after it.
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
