"""The CPU memory of a run on a GPU, while the base is loaded and in the training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from flatlora_diffusion.config import ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.paths import base_path
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.memory.estimate import in_gib, resolution_of
from flatlora_diffusion.memory.meta_step import weight_count

_POSTERIOR = 2 * 2 * 4  # mean and std, plain and mirrored, in fp32


@dataclass(frozen=True)
class CpuEstimate:
    """Bytes of a process, without Python and its packages.

    Attributes:
        loading: the base before it is moved to the GPU, and the parts of its file in another precision.
        class_images: the same for the base that generates class images.
        offloaded: the models that --offload keeps on the CPU.
        latents, prompts: cached latents and prompt embeddings.
        mapped: part of `loading` that is mapped from files in the run's precision: the system can drop these pages.
    """

    loading: int
    class_images: int
    offloaded: int
    latents: int
    prompts: int
    mapped: int

    @property
    def total(self) -> int:
        """Peak of the run."""
        return max(self.loading, self.class_images, self.offloaded + self.latents + self.prompts)


@dataclass(frozen=True)
class _Part:
    """A model of the base: its number of weights, and the bytes and the precision of its files."""

    name: str
    weights: int
    file_bytes: float
    file_dtype: torch.dtype

    def loaded_as(self, dtype: torch.dtype) -> torch.dtype:
        """Return the precision in which a base in `dtype` has it; the VAE is in fp32."""
        return torch.float32 if self.name == "vae" else dtype

    def loaded_bytes(self, dtype: torch.dtype) -> int:
        return self.weights * self.loaded_as(dtype).itemsize


def estimate_cpu_memory(config: TrainConfig, samples: Sequence[Sample]) -> CpuEstimate:
    """Estimate the CPU memory of a run on `samples`; a base that is not on disk counts as SDXL."""
    model, data, family = config.model, config.data, family_of(config.model)
    dtype = DTYPES[config.optim.precision_of_base]
    squares = data.num_class_images if data.with_prior_preservation and not data.use_aspect_ratio_buckets else 0
    is_cached = data.cache_latents and (squares > 0 or not data.with_prior_preservation)
    offloaded = (*(() if config.encodes_in_steps else family.text_parts), *(("vae",) if is_cached else ()))
    captions = {sample.caption for sample in samples}
    if data.with_prior_preservation or config.objective.prior_from_base:
        captions.add(str(data.class_prompt))
    latent = math.prod(family.latent_shape(model, resolution_of(config)))
    class_dtype = DTYPES[data.prior_generation_precision or "fp16"]
    base = Path(base_path(model.pretrained_model_name_or_path))
    parts = _parts(model, base)
    return CpuEstimate(
        loading=_loading(parts, dtype, base.is_file()),
        class_images=_loading(parts, class_dtype, base.is_file()) if data.with_prior_preservation else 0,
        offloaded=sum(part.loaded_bytes(dtype) for part in parts if part.name in offloaded) if model.offload else 0,
        latents=(len(samples) + squares) * _POSTERIOR * latent if data.cache_latents else 0,
        prompts=0 if config.encodes_in_steps else len(captions) * family.prompt_numbers(model) * dtype.itemsize,
        mapped=sum(part.loaded_bytes(dtype) for part in parts if part.file_dtype == part.loaded_as(dtype)),
    )


def cpu_lines(config: TrainConfig, samples: Sequence[Sample], available_bytes: int) -> list[str]:
    """Return log lines with the estimate and, if it exceeds `available_bytes`, how to reduce it."""
    estimate = estimate_cpu_memory(config, samples)
    lines = [f"needs about {in_gib(estimate.total)} of CPU memory, {in_gib(available_bytes)} free"]
    if estimate.total <= available_bytes:
        return lines
    while_loading = (
        "loading the base needs it: stop other programs, or use a base with files in the precision of "
        "--mixed_precision, which need no cast"
    )
    is_loading = estimate.total in (estimate.loading, estimate.class_images)
    lines.append(f"- {while_loading if is_loading else 'caches need it: remove --cache_latents'}")
    return lines


def _loading(parts: Sequence[_Part], dtype: torch.dtype, is_single_file: bool) -> int:
    """Return the bytes of the loaded weights and of the file contents that are cast.

    A file in the right precision is memory-mapped. In a folder the file of one model is open at a time, a single file
    is open as a whole (measured with diffusers 0.42: 690 MiB in fp32 take 1,044 MiB to load in fp16).
    """
    cast = [part.file_bytes for part in parts if part.file_dtype != part.loaded_as(dtype)]
    open_files = sum(cast) if is_single_file else max(cast, default=0)
    return sum(part.loaded_bytes(dtype) for part in parts) + int(open_files)


def _parts(model: ModelConfig, base: Path) -> list[_Part]:
    """Return the parts of the base in the file or folder `base`; for a hub id their precision is by the variant."""
    family = family_of(model)
    counts = {name: weight_count(model, name) for name in family.parts}
    parts = []
    for name, weights in counts.items():
        vae = model.pretrained_vae_model_name_or_path if name == "vae" else None
        folder, variant = (base / name, model.variant) if vae is None else (Path(vae), None)
        is_shared = base.is_file() and vae is None
        of_folder = (path for path in folder.glob("*.safetensors") if not variant or f".{variant}." in path.name)
        files = [base] if is_shared else sorted(of_folder)
        default = torch.float32 if variant is None else torch.float16  # most without variant are fp32
        dtype = _dtype(files[0], family.file_prefixes[name]) if files else default
        size: float = sum(file.stat().st_size for file in files) or weights * dtype.itemsize
        parts.append(_Part(name, weights, size * weights / sum(counts.values()) if is_shared else size, dtype))
    return parts


def _dtype(file: Path, prefix: str) -> torch.dtype:
    """Return the precision of the first weight in a file whose name begins with `prefix`, or else of the first."""
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        of_part = [name for name in names if name.startswith(prefix)]
        dtype: torch.dtype = opened.get_tensor((of_part or names)[0]).dtype
        return dtype
