"""Flat-LoRA in kohya's sd-scripts: `--network_module flatlora_diffusion.other_trainers.sd_scripts`.

sd-scripts imports a network module by name and calls `create_network` of it. The network here is the one of its own
`networks.lora`, with all arguments of that, and its LoRA modules are shown to `FlatLora` as layers of PEFT. sd-scripts
computes each as base(x) + multiplier * scale * up(down(x)), the form of PEFT's.

What is used of it: `create_network(_from_weights)` of `networks.lora`; of the network `unet_loras`,
`text_encoder_loras`, `apply_to`, `set_multiplier`; of a LoRA module `lora_name`, `org_module`, `lora_down`, `lora_up`,
`scale`, and its three kinds of dropout.
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

_OURS = ("sigma", "sigma_schedule", "perturb_seed", "perturb_noise", "perturb_draw", "perturb_norm_every")
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
    """The network of `networks.lora`, trained as Flat-LoRA. Of the `--network_args`, those of `_OURS` are ours."""
    perturb, others = _split(network_args)
    make = import_module("networks.lora").create_network
    return FlatNetwork(make(multiplier, network_dim, network_alpha, vae, text_encoder, unet, **others), perturb)


def create_network_from_weights(
    multiplier: float, file: str | None, vae: Any, text_encoder: Any, unet: Any, weights_sd: Any = None, **others: Any
) -> tuple[nn.Module, Any]:
    """The same with the ranks of a file, for `--dim_from_weights`; for inference, that of `networks.lora`."""
    perturb, others = _split(others)
    make = import_module("networks.lora").create_network_from_weights
    network, weights = make(multiplier, file, vae, text_encoder, unet, weights_sd=weights_sd, **others)
    return (network if others.get("for_inference") else FlatNetwork(network, perturb)), weights


class FlatNetwork(nn.Module):
    """A network of sd-scripts that is perturbed from the start of each training step to the optimizer's step.

    What is not here, the network itself answers: its weights, files and learning rates are its own affair. The step is
    a buffer, so that `--save_state` and `--resume` carry it.
    """

    flat_step: torch.Tensor

    def __init__(self, network: nn.Module, perturb: PerturbConfig) -> None:
        super().__init__()
        self.network: Any = network
        self.register_buffer("flat_step", torch.zeros((), dtype=torch.int64))
        self._perturb = perturb
        self._arguments: Any = None
        self._flat: FlatLora | None = None
        self._is_begun = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def prepare_network(self, args: Any) -> None:
        """Take sd-scripts' arguments. Raises ConfigError where eps could not act as it should."""
        if getattr(args, "deepspeed", False):
            raise ConfigError("--deepspeed replaces the optimizer whose steps Flat-LoRA counts; leave it out")
        self._arguments = args

    def apply_to(self, text_encoder: Any, unet: Any, apply_text_encoder: bool = True, apply_unet: bool = True) -> None:
        """Apply the network, above base layers that eps can act in."""
        loras = [*(self.text_encoder_loras if apply_text_encoder else []), *(self.unet_loras if apply_unet else [])]
        self._loras = {lora.lora_name: lora for lora in loras}
        noise = NoiseConfig.from_settings(self._perturb, int(getattr(self._arguments, "seed", None) or 0))
        self._flat = FlatLora(_as_peft_layers(self._loras), noise)
        self._show(False)
        self._flat.follow()
        register_optimizer_step_post_hook(self._after_step)  # after that of `follow`
        self.network.apply_to(text_encoder, unet, apply_text_encoder, apply_unet)

    def on_step_start(self, text_encoder: Any, unet: Any) -> None:
        """sd-scripts is about to run forward and backward of one micro-batch."""
        assert self._flat is not None, "sd-scripts applies the network before it trains"
        if not self._is_begun:  # only now the number of steps is settled and a resumed state loaded
            now = {"total_steps": int(self._arguments.max_train_steps), "step": int(self.flat_step)}
            self._flat.load_state_dict(self._flat.state_dict() | now)
            self._is_begun = True
        self._show(True)

    def set_multiplier(self, multiplier: float) -> None:
        """As the network's own; at 0 the base is meant, which has no eps."""
        self.network.set_multiplier(multiplier)
        for name, tuner in self._tuners().items():
            tuner.scaling[_ADAPTER] = self._loras[name].scale * multiplier
            tuner._disable_adapters = multiplier == 0

    def _after_step(self, *_: Any) -> None:
        """Some optimizer has stepped: if it was the LoRA's, samples and validation come before the next step."""
        if self._flat is not None and self._flat.step != int(self.flat_step):
            self.flat_step.fill_(self._flat.step)
            self._show(False)

    def _show(self, is_training: bool) -> None:
        for tuner in self._tuners().values():
            tuner.training = is_training

    def _tuners(self) -> dict[str, Any]:
        return {} if self._flat is None else dict(self._flat.layers)


def _as_peft_layers(loras: dict[str, Any]) -> nn.ModuleDict:
    """PEFT layers around the same base layers, with the same A and B; only `FlatLora` looks at them."""
    layers = nn.ModuleDict({name: lora.org_module for name, lora in loras.items()})
    is_dropped = any(getattr(lora, kind, None) for lora in loras.values() for kind in _DROPOUTS)
    config = LoraConfig(r=1, target_modules=list(loras), lora_dropout=0.5 if is_dropped else 0.0)  # 0.5: any
    wanted = [parameter.requires_grad for parameter in layers.parameters()]
    bases = list(layers.parameters())
    inject_adapter_in_model(config, layers, _ADAPTER, low_cpu_mem_usage=True)  # on no device: no random draws
    for parameter, requires_grad in zip(bases, wanted, strict=True):
        parameter.requires_grad_(requires_grad)
    for name, lora in loras.items():
        tuner: Any = layers[name]
        tuner.lora_A[_ADAPTER], tuner.lora_B[_ADAPTER] = lora.lora_down, lora.lora_up
        tuner.scaling[_ADAPTER] = lora.scale
    return layers


def _split(network_args: dict[str, Any]) -> tuple[PerturbConfig, dict[str, Any]]:
    """Our settings and the rest of `--network_args`, which are texts. Raises ConfigError for a text that is none."""
    ours = {name: read_setting(name, value) for name, value in network_args.items() if name in _OURS}
    ours.setdefault("perturb_norm_every", 1)  # a resume inside an interval would need its norms
    return PerturbConfig(**ours), {name: value for name, value in network_args.items() if name not in _OURS}
