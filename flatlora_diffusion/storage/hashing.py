"""Hashes that prove that two runs shared their base, their first weights and every draw but eps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor, nn

from flatlora_diffusion.storage.tensor_io import tensor_bytes

_SAMPLED = 64  # values of each weight that the base's fingerprint reads


class DrawHash:
    """The hash of what one optimizer step saw: images, crops and posterior samples (as latents), noise, timesteps.

    They are read when the step is over: reading waits for the device, which each micro-batch would otherwise do.
    """

    def __init__(self) -> None:
        self._drawn: list[Tensor] = []

    def add(self, *drawn: Tensor) -> None:
        """Add what one micro-batch drew."""
        self._drawn += drawn

    def hexdigest(self) -> str:
        """The first 16 hex digits: enough to tell steps apart, short in a log."""
        return tensors_sha256(self._drawn)[:16]


def tensors_sha256(tensors: Iterable[Tensor]) -> str:
    """The hash of the tensors' bytes, in their order."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor_bytes(tensor))
    return found.hexdigest()


def base_fingerprint(unet: nn.Module) -> str:
    """The hash of the first values of each frozen weight: another checkpoint has another one; read in no time.

    Weights whose quantization makes them a tensor class of their own (torchao) cannot be sliced and are passed over;
    norms, biases and convolutions are never quantized.
    """
    mine = {name: weight for name, weight in unet.named_parameters() if ".lora_" not in name}
    frozen = {name: weight.data for name, weight in mine.items() if not weight.requires_grad}
    names = sorted(frozen, key=lambda name: name.replace(".base_layer", ""))  # a LoRA renames what it wraps
    return tensors_sha256(frozen[name].flatten()[:_SAMPLED] for name in names if type(frozen[name]) is Tensor)
