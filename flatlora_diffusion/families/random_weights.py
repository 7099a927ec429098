"""Random weights in the shapes of a real model, to test a device without a download."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from flatlora_diffusion.storage.rng import generator


def random_weights(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move `model` from the meta device to `device` with random weights that preserve the variance of their inputs."""
    model = model.to(dtype).to_empty(device=device)
    rng = generator(device, 0, "random_base")
    with torch.no_grad():
        for module in model.modules():
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim > 1:
                    weight.normal_(0, 1 / math.sqrt(weight[0].numel()), generator=rng)
                else:  # 1 for the weights of norms, 0 for biases
                    weight.fill_(float(name == "weight"))
        for name, buffer in model.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1], device=device).expand_as(buffer))
            else:  # statistics of a batch norm: 0 and 1
                buffer.fill_(float(name.endswith("running_var")))
    assert isinstance(model, nn.Module)
    return model.requires_grad_(False).eval()
