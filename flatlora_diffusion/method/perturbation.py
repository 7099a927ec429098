"""The old name of `flat_lora`, kept for one release."""

from flatlora_diffusion.method.flat_lora import FlatLora

__all__ = ["FlatLora"]
