"""How much device memory a run will need, and which settings would lower it: counted on meta tensors, not guessed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flatlora_diffusion.config import TEXT_PARTS, ModelConfig, Quantization, TrainConfig
from flatlora_diffusion.data.images import find_images
from flatlora_diffusion.memory.meta_step import (
    Passes,
    Trained,
    rehearse_drawing,
    rehearse_step,
    rehearse_vae,
    weight_count,
)
from flatlora_diffusion.memory.method import bytes_of_method, optimizer_bytes
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.sdxl.loading import vae_dtype
from flatlora_diffusion.sdxl.shapes import native_size, part_settings, size_step

GIB = 2**30
CONTEXT_BYTES = int(0.6 * GIB)  # CUDA's context with the kernels and workspaces of cuBLAS and cuDNN, as commonly seen

# Bytes per weight and per row: bitsandbytes' nf4 has an fp32 scale for 64 weights, the int8 kinds one for each row.
_QUANTIZED: dict[Quantization, tuple[float, int]] = {"nf4": (0.5625, 0), "int8": (1, 4), "torchao-int8": (1, 4)}
_MOMENTS = ("encoding", "previews", "class_images")


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device. The first fields are parts of a training step; the last three are whole moments beside it.

    activations: what backward needs, all held when forward ends. temporary: what backward holds at its peak beyond
    that, with gradient checkpointing the recomputed block. perturbation: what the method holds, of Flat-LoRA
    its norms and the factors of all eps or its largest eps, and AdaLoRA's scores.
    encoding, previews, class_images: all that is held while images are encoded, while previews are drawn or images
    that are not trained on are looked at, and while class images are drawn; 0 if that never happens.
    The allocator's gaps are not counted: leave it a tenth.
    """

    unet: int
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
        """The parts of a training step by name."""
        return {name: value for name, value in vars(self).items() if name not in _MOMENTS}

    @property
    def total(self) -> int:
        """The peak of the whole run."""
        return max(sum(self.parts.values()), *(getattr(self, name) for name in _MOMENTS))


def estimate_memory(config: TrainConfig) -> MemoryEstimate:
    """The device memory of a run on a GPU in eager mode; it takes seconds for SDXL, and no memory.

    `mixed_precision` and `resolution` count as fp32 and as the base's own where they are left open. Raises ConfigError
    when the LoRA's settings name no layer of the base.
    """
    model, data, optim = config.model, config.data, config.optim
    base = dataclasses.replace(model, offload=False, quantize_base=None)  # the rest decides on the shapes
    dtype, resolution = DTYPES[optim.mixed_precision or "no"], resolution_of(config)
    of_base = DTYPES[optim.precision_of_base]
    images = optim.train_batch_size * (2 if data.with_prior_preservation else 1)
    predictions = images * (2 if config.objective.prior_from_base else 1)  # the base's own leave nothing behind
    trained = Trained(base, config.adapter, _new_tokens(config))
    rehearse = partial(rehearse_step, trained, dtype, of_base, predictions, resolution, optim.gradient_checkpointing)
    passes = rehearse()
    # With buckets a class image has as many sizes as there are buckets: it is encoded when it is needed.
    is_cached = data.cache_latents and not (data.with_prior_preservation and data.use_aspect_ratio_buckets)
    its_dtype = _vae_dtype(base, of_base)
    vae_passes = rehearse_vae(base, its_dtype, 1 if is_cached else images, resolution)

    lora = 4 * sum(map(math.prod, passes.trained))
    text_encoders = of_base.itemsize * sum(weight_count(base, part) for part in TEXT_PARTS)
    vae = its_dtype.itemsize * weight_count(base, "vae")
    step = MemoryEstimate(
        unet=_unet_bytes(passes, model.quantize_base, of_base.itemsize),
        text_encoders=0 if model.offload and not config.encodes_in_steps else text_encoders,
        vae=0 if model.offload and is_cached else vae,
        lora=lora,
        gradients=lora,
        optimizer=sum(optimizer_bytes(shape, optim) for shape in passes.trained),
        ema=lora if optim.use_ema else 0,
        activations=passes.saved,
        temporary=passes.peak - passes.saved + _dequantized(passes, model.quantize_base, dtype.itemsize),
        perturbation=bytes_of_method(rehearse, dtype.itemsize, config),
        context=CONTEXT_BYTES,
    )
    loaded = step.context + step.unet + text_encoders + vae + lora
    kept = step.optimizer + step.ema
    if is_cached:  # before anything is trained; a UNet that is placed last is not there yet
        while_encoding = loaded - (step.unet + lora if model.is_unet_last else 0)
    else:  # in each step, beside what the last one has left
        while_encoding = loaded - text_encoders + step.text_encoders + kept + step.gradients
    has_previews = config.run.validation_prompt is not None or config.run.validation_prompts_file is not None
    drawing = max(vae_passes.decode_peak, rehearse_drawing(base, of_base, 1, resolution)) if has_previews else 0
    has_looks = config.run.validation_data_dir is not None or data.holdout_images > 0
    looking = rehearse_vae(base, its_dtype, 1, resolution).encode_peak if has_looks else 0
    return dataclasses.replace(
        step,
        encoding=while_encoding + vae_passes.encode_peak,
        previews=loaded + kept + max(drawing, looking) if has_previews or has_looks else 0,
        class_images=_class_images(config, passes, resolution),
    )


def memory_advice(config: TrainConfig, estimate: MemoryEstimate, available_bytes: int) -> list[str]:
    """The switches that would lower `estimate`, a sentence each, the largest saving first; none if it fits."""
    if estimate.total <= available_bytes:
        return []
    return [
        f"{switch} saves {in_gib(saving)}"
        + (", and the run fits" if estimate.total - saving <= available_bytes else ", which is not enough alone")
        for switch, saving in _savings(config, estimate)
    ]


def preflight_lines(config: TrainConfig, available_bytes: int) -> list[str]:
    """What to tell before a run on a GPU with `available_bytes` free: the estimate, and what lowers it if need be."""
    estimate = estimate_memory(config)
    need = f"about {in_gib(estimate.total)} of device memory needed, {in_gib(available_bytes)} free"
    advice = memory_advice(config, estimate, available_bytes)
    return [need, *(f"- {line}" for line in advice)]


def out_of_memory_text(config: TrainConfig) -> str:
    """What a run that ran out of device memory says: its estimate and the switches that would lower it."""
    estimate = estimate_memory(config)
    lines = [f"{switch} saves {in_gib(saving)}" for switch, saving in _savings(config, estimate)]
    head = f"the device is out of memory; these settings need about {in_gib(estimate.total)}. "
    if not lines:
        return head + "No setting lowers that; use a device with more memory, or end what else uses this one"
    return head + "What lowers it:\n" + "\n".join(f"- {line}" for line in lines)


def _savings(config: TrainConfig, estimate: MemoryEstimate) -> list[tuple[str, int]]:
    """Switches and the bytes that each saves on its own, the largest first; those that save under 1 % are left out."""
    found = [
        (name, estimate.total - estimate_memory(config.replace(**changes)).total)
        for name, changes in _switches(config)
    ]
    worthwhile = [(name, saving) for name, saving in found if saving > (estimate.total - CONTEXT_BYTES) / 100]
    return sorted(worthwhile, key=lambda pair: -pair[1])


def _switches(config: TrainConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings that could lower the memory and are not on yet, as the user types them."""
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
    """The settings that lower the memory by training on less, or less."""
    multiple = size_step(config.model)
    smaller = resolution_of(config) * 3 // 4 // multiple * multiple
    if smaller:
        yield f"--resolution {smaller}", {"resolution": smaller}
    if config.adapter.train_text_encoder:
        yield "no --train_text_encoder", {"train_text_encoder": False}
    if config.tokens.train_text_encoder_ti:
        yield "no --train_text_encoder_ti", {"train_text_encoder_ti": False}


def _class_images(config: TrainConfig, passes: Passes, resolution: int) -> int:
    """All that is held while class images are drawn, with the base alone; 0 where there are enough of them."""
    data, model = config.data, dataclasses.replace(config.model, offload=False, quantize_base=None)
    if not data.with_prior_preservation:
        return 0
    folder = Path(str(data.class_data_dir))
    if folder.is_dir() and len(find_images(folder)[0]) >= data.num_class_images:
        return 0
    dtype = DTYPES[data.prior_generation_precision or "fp16"]
    its_dtype = _vae_dtype(model, dtype)
    drawing = rehearse_drawing(model, dtype, data.sample_batch_size, resolution)
    decoding = rehearse_vae(model, its_dtype, 1, resolution).decode_peak
    unet = _unet_bytes(passes, config.model.quantize_base, dtype.itemsize)
    encoders = dtype.itemsize * sum(weight_count(model, part) for part in TEXT_PARTS)
    vae = its_dtype.itemsize * weight_count(model, "vae")
    if config.model.is_unet_last:  # one model after the other
        return CONTEXT_BYTES + max(encoders, unet + drawing, vae + decoding)
    return CONTEXT_BYTES + encoders + unet + vae + max(drawing, decoding)


def _vae_dtype(model: ModelConfig, dtype: torch.dtype) -> torch.dtype:
    """What the VAE computes in beside a base in `dtype`."""
    is_own = model.pretrained_vae_model_name_or_path is None
    return torch.float32 if is_own else vae_dtype(part_settings(model, "vae"), dtype)


def resolution_of(config: TrainConfig) -> int:
    """The run's size in pixels; the base's own where it is left open."""
    return config.data.resolution or native_size(config.model)


def _new_tokens(config: TrainConfig) -> int:
    tokens = config.tokens
    return len(tokens.placeholders) * tokens.num_new_tokens_per_abstraction if tokens.train_text_encoder_ti else 0


def _unet_bytes(passes: Passes, kind: Quantization | None, width: int) -> int:
    """The frozen UNet with `width` bytes per weight; only its Linear layers are quantized."""
    per_weight, per_row = (width, 0) if kind is None else _QUANTIZED[kind]
    linear = sum(rows * (inputs * per_weight + per_row) for rows, inputs in passes.linear)
    return int(linear) + passes.other * width


def _dequantized(passes: Passes, kind: Quantization | None, width: int) -> int:
    """The largest weight that a quantized layer turns back for its matmul."""
    return 0 if kind is None else width * max(rows * inputs for rows, inputs in passes.linear)


def in_gib(count: int) -> str:
    """A number of bytes as it is told."""
    return f"{count / GIB:.1f} GiB" if count > GIB / 10 else f"{count / 2**20:.1f} MiB"
