"""What the optimizer and the method hold beside weights and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from flatlora_diffusion.config import OptimConfig, PerturbConfig, TrainConfig
from flatlora_diffusion.memory.meta_step import Passes, Taking
from flatlora_diffusion.method.low_rank_draw import DRAW_RANK

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


def bytes_of_method(rehearse: Callable[..., Passes], width: int, config: TrainConfig, examples: int) -> int:
    """What the method holds in a step, or LoRA-GA before the first one if that is more.

    LoRA-GA: a slope of all adapted weights in fp32, and the layers' inputs while it is read, which with several
    micro-batches are there at once. SAM: sketches in place of that slope, and the same inputs. Bi-LoRA: a second LoRA
    with gradient, AdamW's state and activations.
    LoRA-SAM and noise in A and B: a copy of the LoRA and its steps. AdaLoRA: three numbers for each of the LoRA's.
    `rehearse` makes the passes of a step, and with `taking` also those of a method.
    """
    passes, method, optim = rehearse(), config.perturb.method, config.optim
    trained = sum(shape.numel() for shape in passes.trained)

    def beyond(taking: Taking, micro_batches: int = 1) -> int:
        return rehearse(taking=taking, micro_batches=min(micro_batches, 2)).peak - passes.peak

    def slopes(micro_batches: int) -> int:
        return max(4 * sum(shape.numel() for shape in passes.adapted), beyond("slopes", micro_batches))

    held = 0
    if config.perturb.perturbs_weights:
        held = _perturbation(passes, width, config.perturb, examples)
    elif method == "sam":
        held = beyond("sam", optim.gradient_accumulation_steps)
    elif method == "bi-lora":
        held = 8 * trained + beyond("bi-lora")
    elif method in ("lora-sam", "factor-noise"):
        held = 8 * trained
    if config.adapter.adapter == "adalora":
        held += 12 * trained
    if config.adapter.adapter == "lora-ga":
        held = max(held, slopes(config.adapter.slope_steps * optim.gradient_accumulation_steps))
    return held


def _perturbation(passes: Passes, width: int, config: PerturbConfig, examples: int) -> int:
    """Two fp32 numbers per row of every adapted layer, and eps of the largest in fp32 and in the compute dtype.

    A low-rank draw holds the factors of all eps in its place, in half precision and, in fp32, as computed with, too;
    for each example factors of its own, drawn in fp32 and kept in half precision. Of its products with the layers'
    inputs nothing is kept but, in the LoRA's own branch, DRAW_RANK numbers of each token, beside hundreds.
    """
    rows = sum(shape[0] for shape in passes.adapted)
    if config.perturb_draw == "low_rank":
        inputs = sum(shape[1:].numel() for shape in passes.adapted)
        if config.perturb_per == "example":
            return 8 * rows + 6 * DRAW_RANK * (rows + inputs) * examples
        return 8 * rows + DRAW_RANK * (rows + inputs) * (2 if width == 2 else 2 + width)
    largest = max(shape.numel() for shape in passes.adapted)
    return 8 * rows + largest * (4 if width == 4 else 4 + width)
