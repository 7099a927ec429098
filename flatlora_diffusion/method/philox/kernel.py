"""W + eps in one pass over memory: Triton's kernel for the draws of `numbers.py`.

Each program reads four stretches of W, draws their numbers in registers with 7 rounds of Philox, which suffice here
(see `numbers.py`), and writes W + eps in the compute dtype; eps itself is never in memory. The numbers depend on seed
and place, not on how many places a program has.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from flatlora_diffusion.method.philox.numbers import HALF, ROUNDS, TURN, UNIT

BLOCK = 1024  # counters of one program, with 4 numbers each


def perturbed(
    weight: Tensor | None,
    row_std: Tensor,
    shape: tuple[int, ...],
    seed: int,
    dtype: torch.dtype,
) -> Tensor:
    """As `numbers.perturbed_by_place`, of fewer than 2^31 numbers. W is added in fp32; the sum is rounded once."""
    out = torch.empty(shape, dtype=dtype, device=row_std.device)
    count = out.numel()
    quarter = -(-count // 4)
    source = row_std if weight is None else weight.contiguous()
    with torch.cuda.device_of(out):
        _perturb[(triton.cdiv(quarter, BLOCK),)](
            source,
            row_std.contiguous(),
            out,
            seed,
            count,
            quarter,
            math.prod(shape[1:]),
            has_weight=weight is not None,
            rounds=ROUNDS,
            unit=UNIT,
            half=HALF,
            turn=TURN,
            block=BLOCK,
        )
    return out


@triton.jit(do_not_specialize=["seed"])
def _perturb(  # type: ignore[no-untyped-def]  # noqa: PLR0913 (pointers and numbers, which Triton gives their types)
    weight,
    row_std,
    out,
    seed,
    count,
    quarter,
    inputs,
    has_weight: tl.constexpr,
    rounds: tl.constexpr,
    unit: tl.constexpr,
    half: tl.constexpr,
    turn: tl.constexpr,
    block: tl.constexpr,
):
    counters = tl.program_id(0) * block + tl.arange(0, block)
    first, second, third, fourth = tl.randint4x(seed, counters, rounds)
    for pair in tl.static_range(2):
        length = (first if pair == 0 else third).to(tl.uint32, bitcast=True).to(tl.float32)
        angle = (second if pair == 0 else fourth).to(tl.uint32, bitcast=True).to(tl.float32) * turn
        radius = tl.sqrt(-2.0 * tl.log(length * unit + half))
        for half_turn in tl.static_range(2):
            z = radius * (tl.cos(angle) if half_turn == 0 else tl.sin(angle))
            place = counters + (2 * pair + half_turn) * quarter
            is_there = (counters < quarter) & (place < count)
            value = z * tl.load(row_std + place // inputs, mask=is_there, other=0.0)
            if has_weight:
                value += tl.load(weight + place, mask=is_there, other=0.0).to(tl.float32)
            tl.store(out + place, value.to(out.dtype.element_ty), mask=is_there)
