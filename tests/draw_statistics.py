"""What can be said of means over draws whose entries need not be normal, nor independent within a draw."""

from __future__ import annotations

from torch import Tensor


def assert_mean(samples: Tensor, expected: float, errors: float = 6) -> None:
    """Each mean over the draws, the first dimension, is `expected` within so many of its own standard errors."""
    error = samples.std(dim=0) / len(samples) ** 0.5
    off = (samples.mean(dim=0) - expected).abs()
    worst = float((off / error.clamp_min(1e-12)).max())
    assert worst < errors, f"off by {worst:.1f} standard errors"


def assert_unit_variance(z: Tensor) -> None:
    """Draws (D, m, n) whose rows have mean 0 and variance 1, each of them and, more sharply, all together."""
    assert_mean(z.mean(dim=2), 0)
    assert_mean(z.square().mean(dim=2), 1)
    assert_mean(z.square().mean(dim=(1, 2)), 1, errors=5)
