"""The parts of a pipeline and the layers of a model that an adapter changes, and their base weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from flatlora_diffusion.config import ADAPTERS, DENOISERS, TEXT_PARTS, ConfigError
from flatlora_diffusion.method.flat_lora import FlatLora
from flatlora_diffusion.method.layers import int8_steps

ADAPTER = "default"
PARTS = (*DENOISERS, *TEXT_PARTS)  # of any family; a pipeline has some of them


def parts_of(pipeline: Any) -> tuple[str, ...]:
    """The parts of a pipeline that a LoRA can change, the denoiser first."""
    return tuple(part for part in PARTS if getattr(pipeline, part, None) is not None)


def denoiser_of(pipeline: Any) -> str:
    """The name of the denoiser in a pipeline."""
    return next(part for part in DENOISERS if hasattr(pipeline, part))


def lora_layers(model: nn.Module) -> dict[str, LoraLayer]:
    """The adapted layers by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def base_weight(base: Any) -> Tensor:
    """W of a base layer in its shape and fp32; a quantized weight is dequantized."""
    steps = int8_steps(base)
    if steps is not None:
        return base.weight.data.float() * steps[:, None]
    weight: Tensor = dequantize_module_weight(base)
    return weight.float()


def check_adaptable(adapter: str, name: str, base: nn.Module, rank: int) -> None:
    """Raise ConfigError if the base layer `base`, called `name`, cannot have this adapter with this rank."""
    row = ADAPTERS[adapter]
    if row.is_linear_only and not isinstance(base, nn.Linear):
        raise ConfigError(
            f"adapter={adapter!r} supports linear layers only, not {name}; leave it out of --lora_target_modules"
        )
    if row.directions and isinstance(base, nn.Linear):
        most = min(base.in_features, base.out_features) // row.directions
        if rank > most:
            raise ConfigError(
                f"rank={rank} is more than --adapter {adapter} supports at {name}, {base.out_features} x "
                f"{base.in_features}; give at most {most}"
            )


@contextmanager
def base_alone(model: nn.Module, flats: Sequence[FlatLora]) -> Iterator[None]:
    """Compute with the base of `model` alone: without LoRA, and without the eps of `flats`."""
    with ExitStack() as stack:
        for flat in flats:
            stack.enter_context(flat.disabled())
        for layer in lora_layers(model).values():
            layer.enable_adapters(False)
            stack.callback(layer.enable_adapters, True)
        yield
