"""The hash of a step's random draws and the fingerprint of a base."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flatlora_diffusion.storage.hashing import DrawHash, base_fingerprint, tensors_sha256


def _hash(latents: Tensor, ids: Tensor, noise: Tensor, timesteps: Tensor) -> str:
    result = DrawHash()
    result.add(latents, ids, noise, timesteps)
    return result.hexdigest()


def test_each_draw_of_a_step_changes_its_hash() -> None:
    draws = [torch.zeros(1, 4, 2, 2), torch.zeros(1, 6), torch.zeros(1, 4, 2, 2), torch.zeros(1, dtype=torch.long)]
    hashes = {_hash(*draws)}
    for place in range(4):
        changed = [tensor + (index == place) for index, tensor in enumerate(draws)]
        hashes.add(_hash(*changed))
    assert len(hashes) == 5
    assert _hash(*(tensor.clone() for tensor in draws)) in hashes


def test_hashes_are_read_from_the_device_only_after_the_step() -> None:
    """A meta tensor cannot be read, as one of a GPU cannot without waiting for it."""
    result = DrawHash()
    result.add(torch.zeros(1, device="meta"))
    with pytest.raises(NotImplementedError):
        result.hexdigest()


def test_bf16_tensors_can_be_hashed() -> None:
    one = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert tensors_sha256([one]) == tensors_sha256([one.clone()])
    assert tensors_sha256([one]) != tensors_sha256([one * 2])


def test_the_base_s_fingerprint_depends_on_frozen_weights_only() -> None:
    frozen, trained = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    model = nn.Sequential(frozen, trained)
    before = base_fingerprint(model)
    with torch.no_grad():
        trained.weight.add_(1)
    assert base_fingerprint(model) == before, "what is trained is not the base"
    with torch.no_grad():
        frozen.bias[3] += 1
    assert base_fingerprint(model) != before
