"""Seeds for every random draw: a function of (root seed, purpose, step, ...), never of global state or the clock."""

from __future__ import annotations

import hashlib
import json

import torch

FLATNESS = "flatness"
"""The purpose of draws that measure: no LoRA is measured under the very eps that it was trained with."""

_ENCODER = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"))


def derive_seed(root: int, *path: str | int) -> int:
    """A 63-bit seed for `path` under `root`; equal arguments give equal seeds on every platform and Python version.

    PyTorch's generator on a CPU uses the lower 32 bits of it, on CUDA all: on a CPU a few pairs of some 100,000 draws
    are alike.
    """
    text = _ENCODER.encode([root, *path])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(device: torch.device | str, root: int, *path: str | int) -> torch.Generator:
    """A private generator on `device`, seeded for `path`. CPU and CUDA give different numbers for one seed."""
    rng = torch.Generator(device=device)
    rng.manual_seed(derive_seed(root, *path))
    return rng
