"""Hashes to verify that two runs share their base, initial weights and all random draws except the noise eps."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from torch import Tensor, nn

from flatlora_diffusion.storage.tensor_io import tensor_bytes

_SAMPLED = 64  # values per weight in the base's fingerprint


class DrawHash:
    """Hash of the random draws of one optimizer step: latents (images, crops, posterior samples), noise, timesteps."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []

    def add(self, *tensors: Tensor) -> None:
        """Add the draws of one micro-batch."""
        self._tensors += tensors  # hashed only at the end of the step, because reading them synchronizes the device

    def hexdigest(self) -> str:
        """Return the first 16 hex digits: enough to distinguish steps, short in a log."""
        return tensors_sha256(self._tensors)[:16]


def tensors_sha256(tensors: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the tensors' bytes, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def base_fingerprint(model: nn.Module) -> str:
    """Return a hash of the first values of each frozen weight, which is fast and identifies a checkpoint."""
    frozen = {
        name: weight.data
        for name, weight in model.named_parameters()
        if ".lora_" not in name and not weight.requires_grad
    }
    names = sorted(frozen, key=lambda name: name.replace(".base_layer", ""))  # a LoRA renames the layers it wraps
    # torchao's tensor subclasses cannot be sliced; norms, biases and convolutions are never quantized.
    return tensors_sha256(frozen[name].flatten()[:_SAMPLED] for name in names if type(frozen[name]) is Tensor)
