"""Computing on meta tensors as a GPU would."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from flatlora_diffusion.memory.meta_allocator import AsOnGpu, LiveBytes


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
