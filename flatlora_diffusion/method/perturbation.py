"""Flat-LoRA (arXiv:2409.14396): train LoRA on the expected loss E[L(W + sBA + eps)] without ever writing W.

Eq. 7 of the paper, for a layer with m filters (rows) of n inputs and merged weight W' = W + sBA:

    eps[i, j] ~ N(0, sigma^2 / n * ||W'[i]||^2)

The reference code adds eps to W in place and subtracts it later, which drifts half-precision weights, and reseeds the
global generator; here eps lives only inside the layer's op, drawn from a private generator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import is_
from typing import Any, get_args

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError, NoiseKind, PerturbConfig, SigmaSchedule
from flatlora_diffusion.ground.seeds import derive_seed
from flatlora_diffusion.method.adapted_layers import AdaptedLayer, find_adapted_layers
from flatlora_diffusion.method.filter_norms import merged_square_norms, row_stds
from flatlora_diffusion.method.noise import NoiseSpec, perturbed_layer, row_noise


@dataclass(frozen=True)
class _Open:
    """The perturbation that is in force."""

    step: int
    slot: int
    sigma: float


class FlatLora:
    """Perturbs every LoRA layer of `model` inside `perturb`, and nothing outside of it.

    Args:
        model: any module with PEFT LoRA layers (a UNet after `add_adapter`, a `get_peft_model` result).
        sigma: relative radius of the noise: E||eps_i||^2 = sigma^2 ||W'_i||^2. 0.05 to 0.1 in the paper.
        schedule: how sigma grows over `total_steps`: `cosine` (0 to sigma), `linear` (0 to sigma) or `constant`.
        total_steps: optimizer steps after which a ramp has reached `sigma`.
        seed: eps is a function of (seed, prefix, layer name, step, slot) and of nothing else.
        noise: `filter` is Eq. 7; `iid` gives every row of a layer the same std, at equal expected energy.
        prefix: keeps models apart that share layer names, such as SDXL's two text encoders.

    Raises:
        ConfigError: a setting out of range, no LoRA layer, or adapted layers that cannot be perturbed (named).
    """

    def __init__(
        self,
        model: nn.Module,
        sigma: float = 0.1,
        schedule: SigmaSchedule = "cosine",
        total_steps: int = 500,
        seed: int = 0,
        noise: NoiseKind = "filter",
        prefix: str = "unet",
    ) -> None:
        self._configure(sigma, schedule, total_steps, seed, noise, prefix)
        self._model = model
        self._adapters = _adapters(model)
        self._open: _Open | None = None
        self._disabled = 0
        self._row_std: dict[str, Tensor] = {}
        self._layers = {layer.name: layer for layer in find_adapted_layers(model)}
        for layer in self._layers.values():
            layer.attach(self._forward)

    @property
    def layers(self) -> Mapping[str, BaseTunerLayer]:
        """The perturbed PEFT layers by name: the module path without PEFT's, DDP's and torch.compile's wrappers."""
        return {name: layer.tuner for name, layer in self._layers.items()}

    @property
    def state_bytes(self) -> int:
        """Bytes kept between steps: the (m,) squared row norms of each frozen W."""
        return sum(layer.base_square_norms.nbytes for layer in self._layers.values())

    def sigma_at(self, step: int) -> float:
        """sigma at the 0-based optimizer `step`; the ramps start at 0 and stay at sigma from `total_steps` on."""
        progress = min(max(step, 0) / self.total_steps, 1.0)
        if self.schedule == "cosine":
            return self.sigma * (1 - math.cos(math.pi * progress)) / 2
        return self.sigma * progress if self.schedule == "linear" else self.sigma

    @contextmanager
    def perturb(self, step: int, slot: int = 0, sigma: float | None = None) -> Iterator[None]:
        """Evaluate the layers at W + eps while the context is open; run forward AND backward inside.

        `step` is the 0-based optimizer step, `slot` = micro_batch * world_size + rank; `sigma` overrides the schedule.
        Gradient checkpointing is fine: the recomputed forward draws the same eps.
        """
        if not self._layers:
            raise RuntimeError("this FlatLora was detached; make a new one")
        _check_whole("step", step, 0)
        _check_whole("slot", slot, 0)
        self._check_all_attached()
        if self._open is not None:
            raise RuntimeError("perturb() is already open; close it before you open another")
        strength = self.sigma_at(step) if sigma is None else _checked_sigma(sigma)
        if strength > 0:
            self._row_std = self._stds(self._layers.values(), strength)
        self._open = _Open(step, slot, strength)
        try:
            yield
        finally:
            self._open = None
            self._row_std = {}

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
        layer = self._layer(name)
        strength = self.sigma_at(step) if sigma is None else _checked_sigma(sigma)
        return row_noise(self._stds([layer], strength)[name], layer.shape, self._seed(name, step, slot))

    def filter_norms(self, name: str) -> Tensor:
        """||W'[i]||_2 of the merged weight W' = W + sBA of layer `name`, fp32, shape (m,)."""
        with torch.no_grad(), _full_precision():
            ((_, square_norms),) = merged_square_norms([self._layer(name)])
            return square_norms[0].sqrt()

    def state_dict(self) -> dict[str, Any]:
        """The settings from which a resumed run draws the same eps: plain JSON-able values."""
        return {
            "sigma": self.sigma,
            "schedule": self.schedule,
            "total_steps": self.total_steps,
            "seed": self.seed,
            "noise": self.noise_kind,
            "prefix": self.prefix,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the settings of a `state_dict`. Raises ConfigError when a key is missing or not known."""
        if set(state) != set(self.state_dict()):
            raise ConfigError(f"FlatLora state has keys {sorted(state)}, expected {sorted(self.state_dict())}")
        self._configure(**state)

    def detach(self) -> None:
        """Give the model back as it was. The object cannot be used afterwards."""
        for layer in self._layers.values():
            layer.restore()
        self._layers = {}

    def _configure(
        self, sigma: float, schedule: SigmaSchedule, total_steps: int, seed: int, noise: NoiseKind, prefix: str
    ) -> None:
        """Check all settings, then take them over."""
        _check_choice("schedule", schedule, SigmaSchedule)
        _check_choice("noise", noise, NoiseKind)
        _check_whole("total_steps", total_steps, 1)
        _check_whole("seed", seed, 0)
        self.sigma = _checked_sigma(sigma)
        self.schedule, self.noise_kind = schedule, noise
        self.total_steps, self.seed, self.prefix = total_steps, seed, prefix

    def _check_all_attached(self) -> None:
        adapters = _adapters(self._model)
        if adapters and len(adapters) == len(self._adapters) and all(map(is_, adapters, self._adapters)):
            return  # no adapter came or went, so the modules need no second look
        known = {id(layer.tuner) for layer in self._layers.values()}
        tuners = {id(module) for module in self._model.modules() if isinstance(module, BaseTunerLayer)}
        if tuners != known or any(layer.has_other_adapters() for layer in self._layers.values()):
            raise ConfigError("adapters were added or removed after FlatLora was made; detach it and make a new one")
        self._adapters = adapters

    def _forward(self, layer: AdaptedLayer, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of an adapted base layer in place of that of its own forward."""
        if self._open is None or self._open.sigma == 0 or self._disabled or not layer.is_active():
            return layer.base_forward(x, *args, **kwargs)
        row_std = self._row_std[layer.name]
        seed = self._seed(layer.name, self._open.step, self._open.slot)
        base = layer.base
        if layer.is_fusable():
            # fp32 W: one buffer W + eps, no extra matmul; under autocast eps is added in the precision cast.
            dtype = _compute_dtype(base.weight.device, base.weight.dtype)
            spec = NoiseSpec(seed, layer.shape, dtype, layer.convolution)
            bias = None if base.bias is None else base.bias.to(dtype)
            return perturbed_layer(x.to(dtype), bias, base.weight, row_std, spec)
        # Half-precision, quantized, sharded or trainable W: add x * eps^T, which rounds nothing into W.
        output: Tensor = layer.base_forward(x, *args, **kwargs)
        # Quantized layers return the dtype of x, which under autocast may be a LayerNorm's fp32.
        dtype = _compute_dtype(x.device, output.dtype)
        spec = NoiseSpec(seed, layer.shape, dtype, layer.convolution)
        return output + perturbed_layer(x.to(dtype), None, None, row_std, spec).to(output.dtype)

    def _stds(self, layers: Iterable[AdaptedLayer], sigma: float) -> dict[str, Tensor]:
        """Standard deviation of each row of eps by layer, (m,) fp32: sigma / sqrt(n) * ||W'_i||."""
        stds: dict[str, Tensor] = {}
        # The results may be saved for a later backward, so they must not be inference tensors; leaving inference mode
        # turns gradients on, so no_grad comes after it.
        with torch.inference_mode(False), torch.no_grad(), _full_precision():
            for group, square_norms in merged_square_norms(layers):
                of_group = row_stds(square_norms, group[0].inputs, sigma, self.noise_kind).unbind()
                stds.update((layer.name, row_std) for layer, row_std in zip(group, of_group, strict=True))
        return stds

    def _seed(self, name: str, step: int, slot: int) -> int:
        return derive_seed(self.seed, "perturbation", self.prefix, name, step, slot)

    def _layer(self, name: str) -> AdaptedLayer:
        if name not in self._layers:
            raise KeyError(f"no perturbed layer {name!r}; FlatLora.layers lists all {len(self._layers)}")
        return self._layers[name]


def flat_loras(models: Mapping[str, nn.Module], config: PerturbConfig, seed: int, total_steps: int) -> list[FlatLora]:
    """The perturbation of each model, by the prefix of its draws; none for plain LoRA.

    `seed` is that of the draws where the config has none of its own.
    """
    if config.method != "flat-lora":
        return []
    return [
        FlatLora(
            model,
            sigma=config.strength,
            schedule=config.sigma_schedule,
            total_steps=total_steps,
            seed=seed if config.perturb_seed is None else config.perturb_seed,
            noise=config.perturb_noise,
            prefix=prefix,
        )
        for prefix, model in models.items()
    ]


def _adapters(model: nn.Module) -> list[object]:
    """The adapters' configs as PEFT and diffusers keep them, and their dict; empty for a model that keeps none."""
    configs = getattr(model, "peft_config", None)
    return [] if configs is None else [configs, *configs.values()]


@contextmanager
def _full_precision() -> Iterator[None]:
    """No autocast on any device, for norms in fp32."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _compute_dtype(device: torch.device, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of autocast on `device`, or `otherwise` without autocast."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else otherwise


def _checked_sigma(sigma: float) -> float:
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ConfigError(f"sigma={sigma} must be a finite number of at least 0; 0.05 to 0.1 is usual")
    return float(sigma)


def _check_whole(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least {low}")


def _check_choice(name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}")
