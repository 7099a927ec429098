"""Flat-LoRA in kohya's sd-scripts: `--network_module flatlora_diffusion.other_trainers.sd_scripts`.

sd-scripts imports a network module by name and calls its `create_network`. This module wraps the network of
sd-scripts' `networks.lora`, with all its arguments, and presents its LoRA modules to `FlatLora` as PEFT layers:
sd-scripts computes base(x) + multiplier * scale * up(down(x)), as PEFT does.

It uses `create_network(_from_weights)` of `networks.lora`; `unet_loras`, `text_encoder_loras`, `apply_to` and
`set_multiplier` of the network; `lora_name`, `org_module`, `lora_down`, `lora_up`, `scale` and the three dropouts of
a LoRA module.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from flatlora_diffusion.config import ConfigError, PerturbConfig, read_setting
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.noise_config import NoiseConfig

_PERTURB_SETTINGS = ("sigma", "sigma_schedule", "perturb_seed", "perturb_noise", "perturb_draw", "perturb_norm_every")
_DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
_ADAPTER = "default"


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoder: Any,
    unet: Any,
    **network_args: Any,
) -> FlatNetwork:
    """Create the network of `networks.lora`, to be trained as Flat-LoRA with the settings in `--network_args`."""
    perturb, others = _split(network_args)
    make = import_module("networks.lora").create_network
    return FlatNetwork(make(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **others), perturb)


def create_network_from_weights(
    multiplier: float, file: str | None, vae: Any, text_encoder: Any, unet: Any, weights_sd: Any = None, **others: Any
) -> tuple[nn.Module, Any]:
    """Like `create_network` with the ranks of a file (`--dim_from_weights`); for inference, without Flat-LoRA."""
    perturb, others = _split(others)
    make = import_module("networks.lora").create_network_from_weights
    network, weights = make(multiplier, file, vae, text_encoder, unet, weights_sd=weights_sd, **others)
    return (network if others.get("for_inference") else FlatNetwork(network, perturb)), weights


class FlatNetwork(nn.Module):
    """A network of sd-scripts, perturbed from the start of each training step to the optimizer's step.

    All other attributes, such as weights, files and learning rates, are those of the wrapped network. The step is a
    buffer, so that `--save_state` and `--resume` preserve it.
    """

    flat_step: torch.Tensor

    def __init__(self, network: nn.Module, perturb: PerturbConfig) -> None:
        super().__init__()
        self.network: Any = network
        self.register_buffer("flat_step", torch.zeros((), dtype=torch.int64))
        self._perturb = perturb
        self._arguments: Any = None
        self._flat: FlatLora | None = None
        self._has_started = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def prepare_network(self, args: Any) -> None:
        """Store sd-scripts' arguments. Raises ConfigError for arguments with which Flat-LoRA cannot work."""
        if getattr(args, "deepspeed", False):
            raise ConfigError("--deepspeed replaces the optimizer whose steps Flat-LoRA counts; omit it")
        self._arguments = args

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Apply the network, with `FlatLora` attached to its base layers."""
        loras = [*(self.text_encoder_loras if apply_text_encoder else []), *(self.unet_loras if apply_unet else [])]
        self._loras = {lora.lora_name: lora for lora in loras}
        noise = NoiseConfig.from_settings(self._perturb, int(getattr(self._arguments, "seed", None) or 0))
        self._flat = FlatLora(_as_peft_layers(self._loras), noise)
        self._set_training(False)
        self._flat.follow()
        register_optimizer_step_post_hook(self._after_step)  # runs after the hook of `follow`
        self.network.apply_to(text_encoder, unet, apply_text_encoder, apply_unet)

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """Perturb the forward and backward pass of the micro-batch that sd-scripts starts."""
        assert self._flat is not None, "sd-scripts applies the network before it trains"
        if not self._has_started:  # the number of steps is resolved and a resumed state loaded only now
            progress = {"total_steps": int(self._arguments.max_train_steps), "step": int(self.flat_step)}
            self._flat.load_state_dict(self._flat.state_dict() | progress)
            self._has_started = True
        self._set_training(True)

    def set_multiplier(self, multiplier: float) -> None:
        """Set the network's multiplier; 0 selects the base, which is not perturbed."""
        self.network.set_multiplier(multiplier)
        for name, tuner in self._tuners().items():
            tuner.scaling[_ADAPTER] = self._loras[name].scale * multiplier
            tuner._disable_adapters = multiplier == 0

    def _after_step(self, *_: Any) -> None:
        """End the perturbation if the LoRA's optimizer has stepped: samples and validation may follow."""
        if self._flat is not None and self._flat.step != int(self.flat_step):
            self.flat_step.fill_(self._flat.step)
            self._set_training(False)

    def _set_training(self, is_training: bool) -> None:
        for tuner in self._tuners().values():
            tuner.training = is_training

    def _tuners(self) -> dict[str, Any]:
        return {} if self._flat is None else dict(self._flat.layers)


def _as_peft_layers(loras: dict[str, Any]) -> nn.ModuleDict:
    """Wrap the same base layers and factors in PEFT layers, which only `FlatLora` uses."""
    layers = nn.ModuleDict({name: lora.org_module for name, lora in loras.items()})
    has_dropout = any(getattr(lora, kind, None) for lora in loras.values() for kind in _DROPOUTS)
    # FlatLora looks only at whether there is a dropout, so its value is arbitrary.
    config = LoraConfig(r=1, target_modules=list(loras), lora_dropout=0.5 if has_dropout else 0.0)
    base_parameters = [(parameter, parameter.requires_grad) for parameter in layers.parameters()]
    inject_adapter_in_model(config, layers, _ADAPTER, low_cpu_mem_usage=True)  # on the meta device: no random draws
    for parameter, requires_grad in base_parameters:
        parameter.requires_grad_(requires_grad)
    for name, lora in loras.items():
        tuner: Any = layers[name]
        tuner.lora_A[_ADAPTER], tuner.lora_B[_ADAPTER] = lora.lora_down, lora.lora_up
        tuner.scaling[_ADAPTER] = lora.scale
    return layers


def _split(network_args: dict[str, Any]) -> tuple[PerturbConfig, dict[str, Any]]:
    """Split `--network_args` into Flat-LoRA's settings and the rest. Raises ConfigError for invalid values."""
    settings = {name: read_setting(name, value) for name, value in network_args.items() if name in _PERTURB_SETTINGS}
    settings.setdefault("perturb_norm_every", 1)  # resuming inside an interval would need its norms
    others = {name: value for name, value in network_args.items() if name not in _PERTURB_SETTINGS}
    return PerturbConfig(**settings), others
