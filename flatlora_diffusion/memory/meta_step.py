"""Shapes and memory of a training step, of generation and of the VAE, measured on meta tensors."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatlora_diffusion.adapter.layers import lora_layers
from flatlora_diffusion.adapter.lora import add_lora, trainable_parameters
from flatlora_diffusion.adapter.new_tokens import ExtendedEmbedding
from flatlora_diffusion.config import AdapterConfig, ModelConfig, function_at
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.memory.meta_allocator import AsOnGpu, LiveBytes


@dataclass(frozen=True)
class TrainedModel:
    """A LoRA on a base and, for pivotal tuning, the embeddings of `new_tokens`."""

    model: ModelConfig
    adapter: AdapterConfig
    new_tokens: int = 0

    @property
    def trains_text(self) -> bool:
        return self.adapter.train_text_encoder or self.new_tokens > 0


@dataclass(frozen=True)
class StepBytes:
    """Shapes and memory of a training step; weights and gradients of the LoRA are not included in the bytes.

    Attributes:
        trained: shapes of the trained tensors.
        adapted: shapes of the frozen weights with a LoRA.
        linear: (rows, inputs) of the frozen Linear layers of the denoiser.
        other: number of other frozen weights of the denoiser.
        saved: bytes after forward.
        peak: maximum of bytes.
    """

    trained: tuple[torch.Size, ...]
    adapted: tuple[torch.Size, ...]
    linear: tuple[tuple[int, int], ...]
    other: int
    saved: int
    peak: int


@dataclass(frozen=True)
class VaeBytes:
    """Peak bytes of encoding and decoding, without the weights of the VAE."""

    encode_peak: int
    decode_peak: int


@lru_cache(maxsize=64)
def measure_step(  # noqa: PLR0913 (the bytes depend on all of them)
    trained: TrainedModel,
    dtype: torch.dtype,
    base_dtype: torch.dtype,
    images: int,
    resolution: int,
    checkpointing: bool,
    meta_passes: str | None = None,
    micro_batches: int = 1,
) -> StepBytes:
    """Measure forward and backward of a training step.

    Args:
        trained: the model.
        dtype: compute precision.
        base_dtype: precision of the frozen weights; those of the LoRA are fp32.
        images: images per micro-batch.
        resolution: size of the square images in pixels.
        checkpointing: whether gradient checkpointing is on.
        meta_passes: `module:function` that runs the passes of a method instead of plain ones.
        micro_batches: number of micro-batches.

    Raises:
        ConfigError: the LoRA settings match no layer.
    """
    model, denoiser, encoders = _trained_model(trained)
    _set_dtype(model, base_dtype)
    _set_checkpointing(denoiser, encoders, checkpointing, dtype)
    parameters = trainable_parameters(model)
    gradients = [torch.empty_like(parameter) for parameter in parameters.values()]
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.grad = gradient  # so that gradients are not counted as activations
    family = family_of(trained.model)
    inputs = family.step_inputs(trained.model, images, resolution, dtype, trained.trains_text)
    excluded = [*model.parameters(), *model.buffers(), *inputs, *gradients]
    batch = sum(tensor.nbytes for tensor in inputs)
    with AsOnGpu(dtype), LiveBytes(excluded) as bytes_held:
        micro_batch = _MicroBatch(model, inputs, bytes_held)
        _run_passes(meta_passes, model, [micro_batch] * micro_batches)
    frozen = {id(layer.weight): layer.weight for layer in denoiser.modules() if _is_frozen_linear(layer)}
    others = [weight for weight in denoiser.parameters() if not weight.requires_grad and id(weight) not in frozen]
    shapes, adapted = trained_shapes(trained)
    return StepBytes(
        trained=shapes,
        adapted=adapted,
        linear=tuple((weight.shape[0], weight.shape[1]) for weight in frozen.values()),
        other=sum(weight.numel() for weight in others),
        saved=batch + micro_batch.saved,
        peak=batch + bytes_held.peak,
    )


@lru_cache(maxsize=64)
def trained_shapes(trained: TrainedModel) -> tuple[tuple[torch.Size, ...], tuple[torch.Size, ...]]:
    """The shapes of the trained tensors and of the frozen weights with a LoRA. Raises as `measure_step`."""
    model, _, _ = _trained_model(trained)
    layers = lora_layers(model).values()
    return (
        tuple(parameter.shape for parameter in trainable_parameters(model).values()),
        tuple(layer.get_base_layer().weight.shape for layer in layers),
    )


@lru_cache(maxsize=64)
def measure_vae(model: ModelConfig, dtype: torch.dtype, images: int, resolution: int) -> VaeBytes:
    """Encoding `images` images of `resolution` pixels and decoding one, with the VAE in `dtype` and no graph."""
    family = family_of(model)
    vae = family.on_meta(model, "vae").to(dtype)
    with torch.device("meta"):
        pixels = torch.empty(images, 3, resolution, resolution)
        latents = torch.empty(1, *family.latent_shape(model, resolution), dtype=dtype)
    excluded, peaks = [*vae.parameters(), pixels, latents], []
    for run in (lambda: family.posterior(vae, pixels), lambda: family.decode(vae, latents)):
        with torch.no_grad(), AsOnGpu(torch.float32), LiveBytes(excluded) as bytes_held:
            run()
        peaks.append(bytes_held.peak)
    return VaeBytes(peaks[0] + pixels.nbytes, peaks[1] + latents.nbytes)


@lru_cache(maxsize=64)
def measure_sampling(model: ModelConfig, dtype: torch.dtype, images: int, resolution: int) -> int:
    """Return the peak bytes of a denoising step of `images` images with guidance, without the weights."""
    family = family_of(model)
    step = family.step_model(family.on_meta(model, family.denoiser).to(dtype), {}, None)
    inputs = family.step_inputs(model, 2 * images, resolution, dtype, False)
    with torch.no_grad(), AsOnGpu(torch.float32), LiveBytes([*step.parameters(), *inputs]) as bytes_held:
        step(*inputs)
    return bytes_held.peak + sum(tensor.nbytes for tensor in inputs)


@lru_cache(maxsize=64)
def weight_count(model: ModelConfig, part: str) -> int:
    """Return the number of weights of a part of the base."""
    return sum(parameter.numel() for parameter in family_of(model).on_meta(model, part).parameters())


@lru_cache(maxsize=1)  # building a model takes as long as a step, and the estimates measure it with many settings
def _trained_model(trained: TrainedModel) -> tuple[nn.Module, Any, Sequence[Any]]:
    """The module of a step, its denoiser and its text encoders."""
    model, adapter, family = trained.model, trained.adapter, family_of(trained.model)
    denoiser = family.on_meta(model, family.denoiser)
    encoders = {part: family.on_meta(model, part) for part in family.text_parts} if trained.trains_text else {}
    add_lora(denoiser, adapter, 0, encoders if adapter.train_text_encoder else None, model.clip_skip)
    if trained.trains_text and not adapter.train_text_encoder:
        for encoder in encoders.values():
            table = encoder.get_input_embeddings()
            rows = torch.empty(trained.new_tokens, table.embedding_dim, device="meta")
            encoder.set_input_embeddings(ExtendedEmbedding(table, rows))
    return family.step_model(denoiser, encoders, model.clip_skip).train(), denoiser, list(encoders.values())


class _MicroBatch:
    """A `MicroBatch` of `inputs`; `saved` is the number of bytes after its forward."""

    slot = saved = 0

    def __init__(self, model: nn.Module, inputs: Sequence[Tensor], live_bytes: LiveBytes) -> None:
        self._model, self._inputs, self._live_bytes = model, inputs, live_bytes

    def backward(self, weight: float = 1.0, is_shared: bool = True) -> Tensor:
        loss: Tensor = (self._model(*self._inputs).float() - self._inputs[0]).square().mean()
        self.saved = self._live_bytes.live
        loss.backward()
        return loss.detach()


def _run_passes(meta_passes: str | None, model: nn.Module, micro_batches: Sequence[_MicroBatch]) -> None:
    """Run the passes of the function `meta_passes`, or plain ones if None."""
    if meta_passes is not None:
        function_at(meta_passes)(model, micro_batches)
        return
    for batch in micro_batches:
        batch.backward()


def _set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _set_checkpointing(denoiser: Any, encoders: Sequence[Any], is_on: bool, dtype: torch.dtype) -> None:
    """Turn gradient checkpointing on or off, with recomputation under `AsOnGpu`."""
    recomputing: dict[str, Any] = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), AsOnGpu(dtype))}
    if is_on:
        denoiser.enable_gradient_checkpointing(partial(checkpoint, **recomputing))
    else:
        denoiser.disable_gradient_checkpointing()
    for encoder in encoders:
        if is_on:
            encoder.gradient_checkpointing_enable(recomputing)
        elif encoder.is_gradient_checkpointing:
            encoder.gradient_checkpointing_disable()


def _is_frozen_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not layer.weight.requires_grad
