"""Flat-LoRA (arXiv:2409.14396): train LoRA on the expected loss E[L(W + sBA + eps)] without ever writing W.

Eq. 7 of the paper, for a layer with m filters (rows) of n inputs and merged weight W' = W + sBA:

    eps[i, j] ~ N(0, sigma^2 / n * ||W'[i]||^2)

The reference code adds eps to W in place and subtracts it later, which drifts half-precision weights, and reseeds the
global generator; here eps lives only inside the layer's op, drawn from a private generator.

`low_rank_draw.py` has the covariance of Eq. 7 from few numbers; `full_draw.py` draws each entry by itself.
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
from flatlora_diffusion.method.noise_config import NoiseConfig, check_sigma, check_whole
from flatlora_diffusion.method.optimizer_hook import Following
from flatlora_diffusion.method.row_norms import KeptNorms, NormState, RowStds, merged_square_norms


class FlatLora:
    """Perturbs every LoRA layer of `model` inside `perturb`, and nothing outside of it.

    Args:
        model: any module with PEFT LoRA layers (a UNet after `add_adapter`, a `get_peft_model` result).
        config: size, schedule and draws of the noise.
        settings: settings of `NoiseConfig` by name, over those of `config`.

    Raises:
        ConfigError: a setting out of range, no LoRA layer, or adapted layers that cannot be perturbed (named).
    """

    def __init__(self, model: nn.Module, config: NoiseConfig | None = None, **settings: Any) -> None:
        config = replace(config or NoiseConfig(), **settings)
        self._model = model
        self._adapters = _adapters(model)
        self._is_open = False
        self._draw: Draw | None = None
        self._disabled = 0
        self._layers = {layer.name: layer for layer in find_adapted_layers(model)}
        for layer in self._layers.values():
            layer.below.attach(partial(self._base_forward, layer))
        self._following = Following(self._layers, self._draw_at)
        self._use(config)

    @property
    def layers(self) -> Mapping[str, BaseTunerLayer]:
        """The perturbed PEFT layers by name: the module path without PEFT's, DDP's and torch.compile's wrappers."""
        return {name: layer.tuner for name, layer in self._layers.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes kept between steps: the (m,) squared row norms of each frozen W, in host memory, and with `norm_every`
        what follows from those of W'.
        """
        return self._norms.nbytes + sum(layer.base_square_norms.nbytes for layer in self._layers.values())

    def sigma_at(self, step: int) -> float:
        """sigma at the 0-based optimizer `step`; from `total_steps` on a ramp stays at its end."""
        return self.config.sigma_at(step)

    @property
    def step(self) -> int:
        """The 0-based optimizer step that a model which follows an optimizer is at."""
        return self._following.step

    @step.setter
    def step(self, step: int) -> None:
        check_whole("step", step, 0)
        self._following.step = step

    def follow(self, optimizer: Optimizer | None = None) -> None:
        """Perturb each training forward from here on, until `detach`, with one eps for each step of `optimizer`.

        Nothing else changes in the loop: `model.train()` switches eps on, `model.eval()` off, and each step of the
        optimizer brings the next. Accumulated micro-batches share their step's eps, processes of DDP too. Without an
        optimizer, whichever steps the LoRA is followed. `state_dict` then has the step, too. Raises ConfigError for an
        optimizer that does not train the LoRA, is not torch's or trains W, for sharded layers, and, after a step, when
        no forward was one of training.
        """
        self._check_usable()
        self._following.start(optimizer)

    @contextmanager
    def perturb(self, step: int, slot: int = 0, sigma: float | None = None) -> Iterator[None]:
        """Evaluate the layers at W + eps while the context is open; run forward AND backward inside.

        `step` is the 0-based optimizer step, `slot` = micro_batch * world_size + rank; `sigma` overrides the schedule.
        Gradient checkpointing is fine: the recomputed forward draws the same eps.
        """
        self._check_usable()
        check_whole("step", step, 0)
        check_whole("slot", slot, 0)
        if self._is_open:
            raise RuntimeError("perturb() is already open; close it before you open another")
        if self._following.is_on:
            raise RuntimeError("this FlatLora follows an optimizer, so it needs no perturb(); use one of the two")
        self._draw = self._draw_at(step, slot, sigma)
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            self._draw = None

    @contextmanager
    def one_step(self) -> Iterator[None]:
        """While open, ||W'_i|| is taken once a step, however often that is perturbed: A and B must not move."""
        with self._norms.one_step():
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """No eps while this is open, even inside `perturb`: for sampling and evaluation."""
        self._disabled += 1
        try:
            yield
        finally:
            self._disabled -= 1

    def noise(self, name: str, step: int, slot: int = 0, sigma: float | None = None) -> Tensor:
        """The eps that `perturb(step, slot, sigma)` gives layer `name`, materialized: fp32, shape of W."""
        layers = [self._layer(name)] if not self.config.draws.is_joint else self._layers.values()
        with _exact():
            norms = self._norms.seen_from(step, layers)
            return self._drawn(norms, step, slot, self._strength(step, sigma)).noise(name)

    def filter_norms(self, name: str) -> Tensor:
        """||W'[i]||_2 of the merged weight W' = W + sBA of layer `name`, fp32, shape (m,)."""
        with _exact():
            ((_, square_norms),) = merged_square_norms([self._layer(name)])
            return square_norms[0].sqrt()

    def state_dict(self) -> dict[str, Any]:
        """The settings from which a resumed run draws the same eps: plain JSON-able values."""
        return asdict(self.config) | ({"step": self.step} if self._following.is_on else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the settings of a `state_dict`. Raises ConfigError when a key is missing or not known."""
        known = dict(state)
        step = known.pop("step", self.step)
        check_whole("step", step, 0)
        self._use(NoiseConfig.from_state(known))
        self.step = step

    def norm_state(self) -> NormState | None:
        """With `norm_every` > 1 the norms in use, which a run that is resumed inside an interval needs; else None."""
        return self._norms.state()

    def load_norm_state(self, state: NormState) -> None:
        self._norms.load(state)

    def detach(self) -> None:
        """Give the model back as it was. The object cannot be used afterwards."""
        self._following.stop()
        for layer in self._layers.values():
            layer.whole.restore()
            layer.below.restore()
        self._layers = {}

    def _use(self, config: NoiseConfig) -> None:
        self.config = config
        self._norms = KeptNorms(self._layers, config.norm_every, config.noise)
        for layer in self._layers.values():
            layer.whole.restore()
            if layer.plain_pairs and config.draws.acts_in_branch:
                layer.whole.attach(partial(self._layer_forward, layer))

    def _check_usable(self) -> None:
        if not self._layers:
            raise RuntimeError("this FlatLora was detached; make a new one")

    def _check_all_attached(self) -> None:
        adapters = _adapters(self._model)
        if adapters and len(adapters) == len(self._adapters) and all(map(is_, adapters, self._adapters)):
            return  # no adapter came or went, so the modules need no second look
        known = {id(layer.tuner) for layer in self._layers.values()}
        tuners = {id(module) for module in self._model.modules() if isinstance(module, BaseTunerLayer)}
        if tuners != known or any(layer.has_other_adapters() for layer in self._layers.values()):
            raise ConfigError("adapters were added or removed after FlatLora was made; detach it and make a new one")
        self._adapters = adapters

    def _base_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of an adapted base layer in place of that of its own forward."""
        draw = self._acting_on(layer)
        if draw is None:
            return layer.below.forward(x, *args, **kwargs)
        return draw.base_output(layer, x, *args, **kwargs)

    def _layer_forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of base and LoRA in place of PEFT's own forward."""
        draw = None if args or kwargs else self._acting_on(layer)
        output = None if draw is None else draw.layer_output(layer, x)
        return layer.whole.forward(x, *args, **kwargs) if output is None else output

    def _acting_on(self, layer: AdaptedLayer) -> Draw | None:
        """The eps that `layer` computes with now."""
        if self._disabled:
            return None
        return self._following.draw(layer) if self._following.is_on else self._draw

    def _draw_at(self, step: int, slot: int = 0, sigma: float | None = None) -> Draw | None:
        """The eps of a step and slot, with the norms that W' has now; None where sigma is 0."""
        self._check_all_attached()
        strength = self._strength(step, sigma)
        if strength == 0:
            return None
        with _exact():
            return self._drawn(self._norms.at(step), step, slot, strength)

    def _drawn(self, stds: Sequence[RowStds], step: int, slot: int, sigma: float) -> Draw:
        key = DrawKey(self.config.seed, self.config.prefix, step, slot)
        return self.config.draws(self._layers, stds, sigma, key)

    def _strength(self, step: int, sigma: float | None) -> float:
        if sigma is None:
            return self.sigma_at(step)
        check_sigma(sigma)
        return float(sigma)

    def _layer(self, name: str) -> AdaptedLayer:
        if name not in self._layers:
            raise KeyError(f"no perturbed layer {name!r}; FlatLora.layers lists all {len(self._layers)}")
        return self._layers[name]


def _adapters(model: nn.Module) -> list[object]:
    """The adapters' configs as PEFT and diffusers keep them, and their dict; empty for a model that keeps none."""
    configs = getattr(model, "peft_config", None)
    return [] if configs is None else [configs, *configs.values()]


@contextmanager
def _exact() -> Iterator[None]:
    """No gradients, and no autocast on any device.

    What comes of it may be saved for a later backward, so it must not be inference tensors; leaving inference mode
    turns gradients on, so no_grad comes after it.
    """
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
