"""Normal numbers by their place: each a function of a seed and of where it stands, alike on every device.

Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) makes four words of 32 bits of a
counter and a key, and Box and Muller's transform makes four normal numbers of those. A tensor of N numbers has
Q = ceil(N / 4) counters; number j of counter c stands at c + j Q, so that neighbours come of neighbouring counters.

Seven rounds suffice here. It is the least number with which the authors found no failure in BigCrush, ten being their
margin; eps needs no more than right moments and no correlation between places, and each layer, step and slot has a key
of its own.

On CUDA one kernel of Triton's (`kernel.py`) reads W, draws in registers and writes W + eps. Here are the same
numbers by PyTorch, up to the rounding of log, sin and cos.
"""

from __future__ import annotations

import logging
import math
from functools import cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ROUNDS = 7
UNIT = 2.0**-32
HALF = 2.0**-33  # keeps the logarithm's argument from 0
TURN = 2 * math.pi * UNIT
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_AT_ONCE = {"cpu": 2**12}  # counters, whose words stay in its cache
_AT_ONCE_ELSEWHERE = 2**18


def perturbed_by_place(
    weight: Tensor | None, row_std: Tensor, shape: tuple[int, ...], seed: int, dtype: torch.dtype
) -> Tensor:
    """W + diag(row_std) z in `dtype`, or without W when `weight` is None; z of `shape` by `normal`."""
    if _why_not(row_std.device.type, dtype) is None and math.prod(shape) < 2**31:
        from flatlora_diffusion.method.philox.kernel import perturbed

        return perturbed(weight, row_std, shape, seed, dtype)
    return scaled(weight, normal(math.prod(shape), seed, row_std.device).view(shape), row_std).to(dtype)


def scaled(weight: Tensor | None, z: Tensor, row_std: Tensor) -> Tensor:
    """W + diag(row_std) z, or without W when `weight` is None, in the place of z."""
    per_row = row_std.view(-1, *[1] * (z.ndim - 1))
    return z.mul_(per_row) if weight is None else torch.addcmul(weight, z, per_row, out=z)


def normal(count: int, seed: int, device: torch.device) -> Tensor:
    """`count` numbers of N(0, 1), fp32, by PyTorch."""
    quarter, at_once = -(-count // 4), _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE)
    drawn = torch.empty(4, quarter, device=device)
    for start in range(0, quarter, at_once):
        counters = torch.arange(start, min(start + at_once, quarter), device=device)
        first, second, third, fourth = (word.float() for word in words(counters, seed))
        part = drawn[:, start : start + at_once]
        for row, length, angle in ((0, first, second), (2, third, fourth)):
            radius = length.mul_(UNIT).add_(HALF).log_().mul_(-2).sqrt_()
            angle.mul_(TURN)
            torch.mul(radius, angle.cos(), out=part[row])
            torch.mul(radius, angle.sin(), out=part[row + 1])
    return drawn.view(-1)[:count]


def words(counters: Tensor, seed: int, rounds: int = ROUNDS) -> list[Tensor]:
    """The four words of each counter, int64 of 0 to 2^32 - 1."""
    low, high = seed & _WORD, seed >> 32 & _WORD
    zero = torch.zeros_like(counters)
    state = [counters & _WORD, zero, zero, zero]
    for _ in range(rounds):
        left, right = state[0] * _MULTIPLIERS[0], state[2] * _MULTIPLIERS[1]  # of 64 bits, the sign being one
        upper = ((right >> 32) & _WORD) ^ state[1] ^ low
        lower = ((left >> 32) & _WORD) ^ state[3] ^ high
        state = [upper, right & _WORD, lower, left & _WORD]
        low, high = (low + _KEY_STEPS[0]) & _WORD, (high + _KEY_STEPS[1]) & _WORD
    return state


def _why_not(device: str, dtype: torch.dtype) -> str | None:
    """Why Triton's kernel cannot be used there, which is told once; None where it can."""
    reason = _trial(device, dtype)
    if reason is not None:
        _tell(reason)
    return reason


@cache
def _trial(device: str, dtype: torch.dtype) -> str | None:
    if device != "cuda":
        return f"Triton's kernel is for CUDA, not for {device}"
    try:
        from flatlora_diffusion.method.philox.kernel import perturbed

        ones = torch.ones(2, device=device)
        for weight in (None, torch.ones(2, 3, device=device)):
            perturbed(weight, ones, (2, 3), 1, dtype)
    except Exception as error:  # of whatever kind: Triton, its compiler or the driver, and PyTorch can do without
        return f"{type(error).__name__} from Triton: {error}".splitlines()[0]
    return None


@cache
def _tell(reason: str) -> None:
    logger.info("philox draws are made by PyTorch, which is slower: %s", reason)
