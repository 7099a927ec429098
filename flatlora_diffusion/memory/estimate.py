"""The device memory of a run, computed on meta tensors, and the settings that reduce it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flatlora_diffusion.config import (
    ADAPTERS,
    METHODS,
    OptimConfig,
    PerturbConfig,
    Quantization,
    TrainConfig,
)
from flatlora_diffusion.data.images import find_images
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.memory.meta_step import (
    StepBytes,
    TrainedModel,
    measure_sampling,
    measure_step,
    measure_vae,
    weight_count,
)
from flatlora_diffusion.method.draw import DRAW_RANK

GIB = 2**30
CONTEXT_BYTES = int(0.6 * GIB)  # typical CUDA context with the kernels and workspaces of cuBLAS and cuDNN

# Bytes per weight and per row: nf4 of bitsandbytes has an fp32 scale per 64 weights, int8 has one per row.
_QUANTIZED: dict[Quantization, tuple[float, int]] = {"nf4": (0.5625, 0), "int8": (1, 4), "torchao-int8": (1, 4)}
_WEIGHT_GRADIENTS = "flatlora_diffusion.method.rivals.weight_gradients:meta_passes"
_8BIT_FROM, _8BIT_BLOCK = 4096, 256  # bitsandbytes: smaller tensors have fp32 state; an fp32 scale per block
_PHASES = ("encoding", "previews", "class_images")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device. Fragmentation is not included: keep a tenth of the memory free for it.

    Attributes:
        denoiser, text_encoders, vae: weights during a training step.
        lora, gradients, optimizer, ema: trained weights and their state.
        activations: tensors saved for backward.
        temporary: additional memory at the peak of backward, such as a recomputed block.
        perturbation: state of the method and adapter, such as the factors of Flat-LoRA's noise.
        context: CUDA context.
        encoding: total while images are encoded.
        previews: total during previews and validation; 0 without them.
        class_images: total while class images are generated; 0 if none are.
    """

    denoiser: int
    text_encoders: int
    vae: int
    lora: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    temporary: int
    perturbation: int
    context: int
    encoding: int = 0
    previews: int = 0
    class_images: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the parts of a training step by name."""
        return {name: value for name, value in vars(self).items() if name not in _PHASES}

    @property
    def total(self) -> int:
        """Peak of the run."""
        return max(sum(self.parts.values()), *(getattr(self, name) for name in _PHASES))


def estimate_memory(config: TrainConfig) -> MemoryEstimate:
    """Estimate the device memory of a run on a GPU in eager mode; takes seconds for SDXL.

    Args:
        config: settings of the run; default precision is fp32.

    Raises:
        ConfigError: the LoRA settings match no layer of the base.
    """
    model, data, optim = config.model, config.data, config.optim
    base = dataclasses.replace(model, offload=False, quantize_base=None)  # only shapes matter
    dtype, resolution = DTYPES[optim.mixed_precision or "no"], resolution_of(config)
    base_dtype = DTYPES[optim.precision_of_base]
    images = optim.train_batch_size * (2 if data.with_prior_preservation else 1)
    predictions = images * (2 if config.objective.prior_from_base else 1)  # those of the base save no activations
    trained = TrainedModel(base, config.adapter, _new_tokens(config))
    measure = partial(measure_step, trained, dtype, base_dtype, predictions, resolution, optim.gradient_checkpointing)
    passes = measure()
    # With buckets a class image is used in several sizes, so it is encoded in each step.
    is_cached = data.cache_latents and not (data.with_prior_preservation and data.use_aspect_ratio_buckets)
    vae_precision = family_of(base).vae_dtype(base, base_dtype)
    vae_passes = measure_vae(base, vae_precision, 1 if is_cached else images, resolution)

    lora = 4 * sum(map(math.prod, passes.trained))
    text_encoders = base_dtype.itemsize * sum(weight_count(base, part) for part in family_of(model).text_parts)
    vae = vae_precision.itemsize * weight_count(base, "vae")
    step = MemoryEstimate(
        denoiser=_denoiser_bytes(passes, model.quantize_base, base_dtype.itemsize),
        text_encoders=0 if model.offload and not config.encodes_in_steps else text_encoders,
        vae=0 if model.offload and is_cached else vae,
        lora=lora,
        gradients=lora,
        optimizer=sum(optimizer_bytes(shape, optim) for shape in passes.trained),
        ema=lora if optim.use_ema else 0,
        activations=passes.saved,
        temporary=passes.peak - passes.saved + _dequantized(passes, model.quantize_base, dtype.itemsize),
        perturbation=method_bytes(measure, dtype.itemsize, config),
        context=CONTEXT_BYTES,
    )
    loaded = step.context + step.denoiser + text_encoders + vae + lora
    state = step.optimizer + step.ema
    if is_cached:  # encoding is before training, and a UNet with --offload is moved to the device after it
        while_encoding = loaded - (step.denoiser + lora if model.is_unet_last else 0)
    else:  # encoding is in each step, with gradients and optimizer state allocated
        while_encoding = loaded - text_encoders + step.text_encoders + state + step.gradients
    has_previews = config.run.validation_prompt is not None or config.run.validation_prompts_file is not None
    sampling = max(vae_passes.decode_peak, measure_sampling(base, base_dtype, 1, resolution)) if has_previews else 0
    has_validation = config.run.validation_data_dir is not None or data.holdout_images > 0
    has_validation = has_validation or config.run.image_loss_draws > 0
    validation = measure_vae(base, vae_precision, 1, resolution).encode_peak if has_validation else 0
    return dataclasses.replace(
        step,
        encoding=while_encoding + vae_passes.encode_peak,
        previews=loaded + state + max(sampling, validation) if has_previews or has_validation else 0,
        class_images=_class_images(config, passes, resolution),
    )


def memory_advice(config: TrainConfig, estimate: MemoryEstimate, available_bytes: int) -> list[str]:
    """Return a sentence for each setting that reduces the memory, largest saving first; empty if the run fits."""
    if estimate.total <= available_bytes:
        return []
    return [
        f"{switch} saves {in_gib(saving)}"
        + (", and the run fits" if estimate.total - saving <= available_bytes else ", which is not enough on its own")
        for switch, saving in _savings(config, estimate)
    ]


def preflight_lines(config: TrainConfig, available_bytes: int) -> list[str]:
    """Return log lines with the estimate and, if it exceeds `available_bytes`, settings that reduce it."""
    estimate = estimate_memory(config)
    summary = f"needs about {in_gib(estimate.total)} of device memory, {in_gib(available_bytes)} free"
    advice = memory_advice(config, estimate, available_bytes)
    return [summary, *(f"- {line}" for line in advice)]


def out_of_memory_text(config: TrainConfig) -> str:
    """Return the error message of a run out of device memory: the estimate and settings that reduce it."""
    estimate = estimate_memory(config)
    lines = [f"{switch} saves {in_gib(saving)}" for switch, saving in _savings(config, estimate)]
    head = f"the device is out of memory; these settings need about {in_gib(estimate.total)}. "
    if not lines:
        return head + "No setting reduces that; use a device with more memory, or stop other programs on this one"
    return head + "Settings that reduce it:\n" + "\n".join(f"- {line}" for line in lines)


def _savings(config: TrainConfig, estimate: MemoryEstimate) -> list[tuple[str, int]]:
    """Return settings and the bytes that each saves, largest first, without savings below 1 %."""
    savings = [
        (name, estimate.total - estimate_memory(config.replace(**changes)).total)
        for name, changes in _switches(config)
    ]
    worthwhile = [(name, saving) for name, saving in savings if saving > (estimate.total - CONTEXT_BYTES) / 100]
    return sorted(worthwhile, key=lambda pair: -pair[1])


def _switches(config: TrainConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings that could reduce the memory, as flags and as changes of the config."""
    model, data, optim = config.model, config.data, config.optim
    changes: dict[str, Any]
    if not optim.gradient_checkpointing:
        yield "--gradient_checkpointing", {"gradient_checkpointing": True}
    if optim.mixed_precision in (None, "no"):
        yield "--mixed_precision bf16", {"mixed_precision": "bf16"}
    if optim.base_dtype is not None:
        yield "no --base_dtype", {"base_dtype": None}
    if optim.train_batch_size > 1:
        steps = optim.train_batch_size * optim.gradient_accumulation_steps
        changes = {"train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield f"--train_batch_size 1 --gradient_accumulation_steps {steps}", changes
    if data.with_prior_preservation and data.sample_batch_size > 1:
        yield "--sample_batch_size 1", {"sample_batch_size": 1}
    if not (data.cache_latents and model.offload):
        yield "--cache_latents --offload", {"cache_latents": True, "offload": True}
    if optim.optimizer == "adamw" and not optim.use_8bit_adam:
        yield "--use_8bit_adam", {"use_8bit_adam": True}
    if model.quantize_base is None and optim.base_dtype is None:
        yield from ((f"--quantize_base {kind}", {"quantize_base": kind}) for kind in ("nf4", "int8"))
    yield from _less_training(config)


def _less_training(config: TrainConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield settings that reduce the memory by training fewer pixels or weights."""
    multiple = family_of(config.model).sizes(config.model).step
    smaller = resolution_of(config) * 3 // 4 // multiple * multiple
    if smaller:
        yield f"--resolution {smaller}", {"resolution": smaller}
    if config.adapter.train_text_encoder:
        yield "no --train_text_encoder", {"train_text_encoder": False}
    if config.tokens.train_text_encoder_ti:
        yield "no --train_text_encoder_ti", {"train_text_encoder_ti": False}


def _class_images(config: TrainConfig, passes: StepBytes, resolution: int) -> int:
    """Return the bytes while class images are generated; 0 if there are enough of them."""
    data, model = config.data, dataclasses.replace(config.model, offload=False, quantize_base=None)
    if not data.with_prior_preservation:
        return 0
    folder = Path(str(data.class_data_dir))
    if folder.is_dir() and len(find_images(folder)[0]) >= data.num_class_images:
        return 0
    dtype = DTYPES[data.prior_generation_precision or "fp16"]
    vae_precision = family_of(model).vae_dtype(model, dtype)
    sampling = measure_sampling(model, dtype, data.sample_batch_size, resolution)
    decoding = measure_vae(model, vae_precision, 1, resolution).decode_peak
    denoiser = _denoiser_bytes(passes, config.model.quantize_base, dtype.itemsize)
    encoders = dtype.itemsize * sum(weight_count(model, part) for part in family_of(model).text_parts)
    vae = vae_precision.itemsize * weight_count(model, "vae")
    if config.model.is_unet_last:  # the models are moved to the device one by one
        return CONTEXT_BYTES + max(encoders, denoiser + sampling, vae + decoding)
    return CONTEXT_BYTES + encoders + denoiser + vae + max(sampling, decoding)


def resolution_of(config: TrainConfig) -> int:
    """The run's size in pixels; the base's own where it is left open."""
    return config.data.resolution or family_of(config.model).sizes(config.model).native


def _new_tokens(config: TrainConfig) -> int:
    tokens = config.tokens
    return len(tokens.placeholders) * tokens.num_new_tokens_per_abstraction if tokens.train_text_encoder_ti else 0


def _denoiser_bytes(passes: StepBytes, kind: Quantization | None, width: int) -> int:
    """Return the bytes of the frozen denoiser with `width` bytes per weight; only Linear layers are quantized."""
    per_weight, per_row = (width, 0) if kind is None else _QUANTIZED[kind]
    linear = sum(rows * (inputs * per_weight + per_row) for rows, inputs in passes.linear)
    return int(linear) + passes.other * width


def _dequantized(passes: StepBytes, kind: Quantization | None, width: int) -> int:
    """Return the bytes of the largest weight that a quantized layer dequantizes for its matmul."""
    return 0 if kind is None else width * max(rows * inputs for rows, inputs in passes.linear)


def in_gib(count: int) -> str:
    """Format a number of bytes."""
    return f"{count / GIB:.1f} GiB" if count > GIB / 10 else f"{count / 2**20:.1f} MiB"


def optimizer_bytes(shape: torch.Size, config: OptimConfig) -> int:
    """Return the bytes of the optimizer state of a trained tensor."""
    count = shape.numel()
    if config.optimizer == "prodigy":  # at most four fp32 averages
        return 16 * count
    if config.optimizer == "adafactor":  # a row and a column
        return 4 * (count // shape[-1] + count // shape[-2]) if len(shape) > 1 else 4 * count
    if config.use_8bit_adam and count >= _8BIT_FROM:
        return 2 * count + 2 * 4 * math.ceil(count / _8BIT_BLOCK)
    return 8 * count  # two fp32 averages


def method_bytes(measure: Callable[..., StepBytes], width: int, config: TrainConfig) -> int:
    """Return the additional bytes of method and adapter, in a step or in the initialization of LoRA-GA.

    Args:
        measure: measures a step; its argument `meta_passes` selects the passes of a method.
        width: bytes per number of the compute dtype.
        config: settings of the run.
    """
    passes, optim = measure(), config.optim
    method, adapter = METHODS[config.perturb.method], ADAPTERS[config.adapter.adapter]
    trained = sum(shape.numel() for shape in passes.trained)

    def additional(function: str, micro_batches: int) -> int:
        return measure(meta_passes=function, micro_batches=min(micro_batches, 2)).peak - passes.peak

    total = (method.bytes_per_weight + adapter.bytes_per_weight) * trained
    if config.perturb.draws_noise:
        total += _noise_bytes(passes, width, config.perturb)
    if method.meta_passes is not None:
        total += additional(method.meta_passes, optim.gradient_accumulation_steps)
    if config.adapter.effective_lora_ga_steps:
        gradients = 4 * sum(shape.numel() for shape in passes.adapted)
        batches = config.adapter.effective_lora_ga_steps * optim.gradient_accumulation_steps
        total = max(total, gradients, additional(_WEIGHT_GRADIENTS, batches))
    return total


def _noise_bytes(passes: StepBytes, width: int, config: PerturbConfig) -> int:
    """Return the bytes of Flat-LoRA's noise, with two fp32 numbers per row of every adapted layer."""
    rows = sum(shape[0] for shape in passes.adapted)
    if config.perturb_draw == "low_rank":  # the factors in half precision and in the compute dtype
        inputs = sum(shape[1:].numel() for shape in passes.adapted)
        return 8 * rows + DRAW_RANK * (rows + inputs) * (2 if width == 2 else 2 + width)
    largest = max(shape.numel() for shape in passes.adapted)  # eps in fp32 and in the compute dtype
    return 8 * rows + largest * (4 if width == 4 else 4 + width)
