"""Quantization of a frozen denoiser as it is loaded."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

from flatlora_diffusion.config import ConfigError, Quantization
from flatlora_diffusion.storage.formatting import first_line

_BITSANDBYTES_DEVICES = {"nf4": ("cuda", "xpu", "mps"), "int8": ("cuda", "xpu")}  # devices that diffusers supports


def quantization_config(
    part: str, kind: Quantization | None, device: torch.device, dtype: torch.dtype
) -> PipelineQuantizationConfig | None:
    """Return diffusers' quantization of a part of a pipeline; None for None.

    Raises ConfigError for a package that is not installed and a device that is not supported.
    """
    if kind is None:
        return None
    return PipelineQuantizationConfig(quant_mapping={part: _of_model(kind, device, dtype)})


def _of_model(kind: Quantization, device: torch.device, dtype: torch.dtype) -> Any:
    package = "torchao" if kind == "torchao-int8" else "bitsandbytes"
    if find_spec(package) is None:
        raise ConfigError(f"quantize_base={kind} needs the package {package}: pip install {package}")
    if kind in _BITSANDBYTES_DEVICES and device.type not in _BITSANDBYTES_DEVICES[kind]:
        allowed = ", ".join(_BITSANDBYTES_DEVICES[kind])
        raise ConfigError(
            f"quantize_base={kind} cannot be used on {device.type}: diffusers loads it on {allowed} only; "
            "use torchao-int8 or leave it out"
        )
    if kind == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    try:
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    except (ImportError, ValueError) as error:
        raise ConfigError(f"quantize_base={kind} does not work with this torchao: {first_line(error)}") from error
