"""What the optimizer and the method hold beside weights and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flatlora_diffusion.config import ADAPTERS, METHODS, OptimConfig, PerturbConfig, TrainConfig
from flatlora_diffusion.memory.meta_step import Passes
from flatlora_diffusion.method.low_rank_draw import DRAW_RANK

_WEIGHT_GRADIENTS = "flatlora_diffusion.method.rivals.weight_gradients:rehearse"
_8BIT_FROM, _8BIT_BLOCK = 4096, 256  # bitsandbytes: smaller tensors have fp32 state; an fp32 scale per block


def optimizer_bytes(shape: torch.Size, config: OptimConfig) -> int:
    """The state of one trained tensor: AdamW two fp32 averages, prodigy at most four, Adafactor a row and a column."""
    count = shape.numel()
    if config.optimizer == "prodigy":
        return 16 * count
    if config.optimizer == "adafactor":
        return 4 * (count // shape[-1] + count // shape[-2]) if len(shape) > 1 else 4 * count
    if config.use_8bit_adam and count >= _8BIT_FROM:
        return 2 * count + 2 * 4 * math.ceil(count / _8BIT_BLOCK)
    return 8 * count


def bytes_of_method(rehearse: Callable[..., Passes], width: int, config: TrainConfig) -> int:
    """The bytes that method and adapter hold in a step, or LoRA-GA before the first step if that is more.

    SAM holds sketches of W's gradient and the layers' inputs while it reads it, which with several micro-batches are
    there at once; Bi-LoRA a second LoRA with gradient, AdamW's state and activations; LoRA-SAM a copy of the LoRA and
    its steps; AdaLoRA three numbers for each of the LoRA's; LoRA-GA a gradient of all adapted weights in fp32.

    Args:
        rehearse: makes the passes of a step; its argument `rehearse` those of a method.
        width: bytes of a number in the compute dtype.
        config: the settings of the run.
    """
    passes, optim = rehearse(), config.optim
    method, adapter = METHODS[config.perturb.method], ADAPTERS[config.adapter.adapter]
    trained = sum(shape.numel() for shape in passes.trained)

    def beyond(function: str, micro_batches: int) -> int:
        return rehearse(rehearse=function, micro_batches=min(micro_batches, 2)).peak - passes.peak

    held = (method.bytes_per_weight + adapter.bytes_per_weight) * trained
    if config.perturb.draws_noise:
        held += _noise(passes, width, config.perturb)
    if method.rehearse is not None:
        held += beyond(method.rehearse, optim.gradient_accumulation_steps)
    if config.adapter.slope_steps:
        gradients = 4 * sum(shape.numel() for shape in passes.adapted)
        batches = config.adapter.slope_steps * optim.gradient_accumulation_steps
        held = max(held, gradients, beyond(_WEIGHT_GRADIENTS, batches))
    return held


def _noise(passes: Passes, width: int, config: PerturbConfig) -> int:
    """Two fp32 numbers per row of every adapted layer, and eps of the largest in fp32 and in the compute dtype.

    A low-rank draw holds the factors of all eps in its place, in half precision and, in fp32, as computed with, too.
    Of its products with the layers' inputs nothing is kept but, in the LoRA's own branch, DRAW_RANK numbers of each
    token, beside hundreds.
    """
    rows = sum(shape[0] for shape in passes.adapted)
    if config.perturb_draw == "low_rank":
        inputs = sum(shape[1:].numel() for shape in passes.adapted)
        return 8 * rows + DRAW_RANK * (rows + inputs) * (2 if width == 2 else 2 + width)
    largest = max(shape.numel() for shape in passes.adapted)
    return 8 * rows + largest * (4 if width == 4 else 4 + width)
