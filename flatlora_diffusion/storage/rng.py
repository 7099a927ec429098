"""Seeds for every random draw: a function of (root seed, purpose, step, ...), never of global state or the clock."""

from __future__ import annotations

import hashlib
import json

import torch

FLATNESS = "flatness"
"""The purpose of the draws that measure flatness, so that they differ from the draws of training."""

_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


def derive_seed(root: int, *path: str | int) -> int:
    """Return a 63-bit seed for `path` under `root`, equal on every platform and Python version.

    PyTorch's CPU generator uses the lower 32 bits only, so a few collisions among 100,000 seeds are expected.
    """
    text = _ENCODER.encode([root, *path])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, root: int, *path: str | int) -> torch.Generator:
    """Return a generator on `device` seeded for `path`; CPU and CUDA give different numbers for the same seed."""
    rng = torch.Generator(device=device)
    rng.manual_seed(derive_seed(root, *path))
    return rng
