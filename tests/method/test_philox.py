"""Draws by place: Philox's own test vectors, normal numbers, the same by PyTorch and by Triton's kernel."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import HANGS
from tiny_models import normal as made_up, toy_case

from flatlora_diffusion import FlatLora
from flatlora_diffusion.method.philox import numbers
from flatlora_diffusion.method.philox.numbers import normal, perturbed_by_place, words

CPU = torch.device("cpu")
KERNEL = "flatlora_diffusion.method.philox.kernel"
# Counter and key of zeros, from the authors' kat_vectors.
VECTORS = {
    7: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    10: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
}
INTERPRETED = """
import torch
from flatlora_diffusion.method.philox.kernel import perturbed
from flatlora_diffusion.method.philox.numbers import perturbed_by_place

for shape in ((5, 7), (64, 33), (3, 4, 3, 3)):
    row_std, seed = torch.rand(shape[0]) + 0.1, 2**62 + 12345
    turned = torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))  # not contiguous
    for weight in (None, torch.randn(shape), torch.randn(shape).bfloat16(), turned):
        exact = perturbed(weight, row_std, shape, seed, torch.float32)
        assert torch.equal(exact, perturbed(weight, row_std, shape, seed, torch.float32, block=16)), "of the block"
        expected = perturbed_by_place(weight, row_std, shape, seed, torch.float32)
        torch.testing.assert_close(exact, expected, rtol=1e-5, atol=1e-6)
        rounded = perturbed(weight, row_std, shape, seed, torch.bfloat16)
        assert rounded.dtype == torch.bfloat16
        torch.testing.assert_close(rounded.float(), expected, rtol=2**-7, atol=1e-6)
"""


@pytest.mark.parametrize("rounds", VECTORS)
def test_words_are_those_of_the_authors_test_vectors(rounds: int) -> None:
    found = words(torch.zeros(1, dtype=torch.int64), 0, rounds)
    assert [int(word) for word in found] == list(VECTORS[rounds])


def test_seeds_use_all_their_bits_and_counters_too() -> None:
    count = torch.arange(3)
    first = [words(count, seed)[0].tolist() for seed in (0, 1, 1 << 31, 1 << 32, 1 << 62)]
    drawn = [word for row in first for word in row]
    assert len(set(drawn)) == len(drawn)


def test_numbers_are_normal_and_independent() -> None:
    z = normal(400_000, 7, CPU).double()
    error = len(z) ** -0.5
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((z**power).mean()) - moment) < 5 * spread**0.5 * error, f"moment {power}"
    for lag in (1, 2, 3, 160, 100_000, 200_000, 300_000):  # neighbours, rows, and the four of one counter
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 * (len(z) - lag) ** -0.5, f"lag {lag}"
        squares = z.square() - 1
        assert abs(float((squares[lag:] * squares[:-lag]).mean())) < 5 * 2 * (len(z) - lag) ** -0.5, f"squares {lag}"
    assert abs(float((z * normal(400_000, 8, CPU)).mean())) < 5 * error, "another seed"


@pytest.mark.parametrize("count", [1, 4, 1001])
def test_numbers_do_not_depend_on_how_many_are_made_at_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = normal(count, 3, CPU)
    monkeypatch.setitem(numbers._AT_ONCE, "cpu", 16)
    assert torch.equal(normal(count, 3, CPU), whole)
    assert whole.shape == (count,)


def test_the_log_says_once_why_the_kernel_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    numbers._trial.cache_clear()
    numbers._tell.cache_clear()
    flat = FlatLora(toy_case().model, schedule="constant", draw="philox")
    with caplog.at_level(logging.INFO):
        for step in range(3):
            flat.noise("wide", step)
    assert [record.getMessage() for record in caplog.records if "philox" in record.getMessage()] == [
        "philox draws are made by PyTorch, which is slower: Triton's kernel is for CUDA, not for cpu"
    ]


def test_without_triton_or_when_it_fails_pytorch_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, KERNEL, None)
    reason = numbers._trial.__wrapped__("cuda", torch.float32)
    assert reason is not None
    assert "Error from Triton" in reason
    assert len(reason.splitlines()) == 1


def test_triton_s_interpreter_gives_the_numbers_of_pytorch() -> None:
    """In a process of its own: Triton asks for TRITON_INTERPRET when it is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; docs/performance.md says how to run its kernel without a GPU")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, cwd=root, capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gpu_draws_what_a_cpu_draws(dtype: torch.dtype) -> None:
    assert numbers._trial("cuda", dtype) is None, "the kernel does not run"
    weight, row_std = made_up(1, 300, 77), made_up(2, 300).abs() + 0.1
    for start in (None, weight):
        expected = perturbed_by_place(start, row_std, (300, 77), 2**62 + 5, dtype)
        on_gpu = None if start is None else start.cuda()
        found = perturbed_by_place(on_gpu, row_std.cuda(), (300, 77), 2**62 + 5, dtype)
        torch.testing.assert_close(found.cpu().float(), expected.float(), rtol=2**-7, atol=2e-3)
