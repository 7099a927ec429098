"""Counting the bytes of meta tensors, and computing on them as a GPU would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flatlora_diffusion.memory.meta_allocator import AsOnGpu, LiveBytes

KIB = 1024


def block(kib: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(kib * KIB // dtype.itemsize, device="meta", dtype=dtype)


def test_tensors_count_from_creation_to_release() -> None:
    known = block(8)
    with LiveBytes([known]) as held:
        first = known + 1
        assert (held.live, held.peak) == (8 * KIB, 8 * KIB)
        second = first * 2
        del first
        assert (held.live, held.peak) == (8 * KIB, 16 * KIB)
        del second
        assert (held.live, held.peak) == (0, 16 * KIB)


def test_views_and_in_place_changes_count_no_bytes() -> None:
    known = block(8)
    with LiveBytes([known]) as held:
        known.add_(1)
        known.view(2, -1).t()
        assert held.peak == 0
        made = known.clone()
        view = made.view(2, -1)
        del made
        assert held.live == 8 * KIB
        view.mul_(2)
        assert held.peak == 8 * KIB


def test_saved_tensors_count_until_backward_has_run() -> None:
    x = block(8).requires_grad_()
    with LiveBytes([x]) as held:
        loss = (x.exp() * 2).sum()  # exp keeps its result
        assert held.live == 8 * KIB + 4
        torch.autograd.backward(loss, inputs=[x])
        del loss
        assert held.live == 8 * KIB  # the gradient


def test_half_precision_computes_as_cuda_autocast_does() -> None:
    with torch.device("meta"):
        linear, convolution, norm = nn.Linear(8, 8), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
        x, image = torch.empty(4, 8), torch.empty(1, 8, 4, 4)
    with AsOnGpu(torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
        assert convolution(image).dtype == torch.bfloat16
        assert norm(image.bfloat16()).dtype == torch.float32
        assert F.layer_norm(x.bfloat16(), (8,)).dtype == torch.float32
        assert F.scaled_dot_product_attention(image, image, image).dtype == torch.bfloat16
        assert F.silu(image.bfloat16()).dtype == torch.bfloat16
    with AsOnGpu(torch.float32):
        assert linear(x).dtype == norm(image).dtype == torch.float32


def test_attention_saves_no_quadratic_matrix() -> None:
    query, key, value = (torch.empty(1, 2, 512, 8, device="meta").requires_grad_() for _ in range(3))
    with AsOnGpu(torch.float32), LiveBytes([query, key, value]) as held:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        assert held.live == output.nbytes + 2 * 512 * 4
        torch.autograd.backward(output.sum())
    assert held.peak < 2 * 512 * 512 * 4
    assert query.grad is not None
    assert query.grad.shape == query.shape
