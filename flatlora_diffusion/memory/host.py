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
    return CpuEstimate(
        loading=_loading(model, dtype),
        class_images=_loading(model, class_dtype) if data.with_prior_preservation else 0,
        offloaded=sum(weight_count(model, part) * _loaded_as(part, dtype).itemsize for part in offloaded)
        if model.offload
        else 0,
        latents=(len(samples) + squares) * _POSTERIOR * latent if data.cache_latents else 0,
        prompts=0 if config.encodes_in_steps else len(captions) * family.prompt_numbers(model) * dtype.itemsize,
        mapped=_mapped(model, dtype),
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


def _loading(model: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the loaded weights and of the file contents that are cast.

    A file in the right precision is memory-mapped. In a folder the file of one model is open at a time, a single file
    is open as a whole (measured with diffusers 0.42: 690 MiB in fp32 take 1,044 MiB to load in fp16).
    """
    counts = {part: weight_count(model, part) for part in family_of(model).parts}
    cast = [
        _file_bytes(model, part, counts)
        for part in family_of(model).parts
        if _file_dtype(model, part) != _loaded_as(part, dtype)
    ]
    open_files = sum(cast) if _single_file(model) is not None else max(cast, default=0)
    return sum(counts[part] * _loaded_as(part, dtype).itemsize for part in counts) + int(open_files)


def _mapped(model: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the parts whose file has the precision they are loaded in."""
    parts = [part for part in family_of(model).parts if _file_dtype(model, part) == _loaded_as(part, dtype)]
    return sum(weight_count(model, part) * _loaded_as(part, dtype).itemsize for part in parts)


def _loaded_as(part: str, dtype: torch.dtype) -> torch.dtype:
    """Return the precision of a loaded part; the VAE is in fp32."""
    return torch.float32 if part == "vae" else dtype


def _single_file(model: ModelConfig) -> Path | None:
    file = Path(base_path(model.pretrained_model_name_or_path))
    return file if file.is_file() else None


def _file_bytes(model: ModelConfig, part: str, counts: dict[str, int]) -> float:
    """Return the bytes of a part in its file, for a hub id by the precision of its variant."""
    file = _single_file(model)
    if file is not None and not _is_separate_vae(model, part):
        return file.stat().st_size * counts[part] / sum(counts.values())
    return sum(path.stat().st_size for path in _files(model, part)) or counts[part] * _file_dtype(model, part).itemsize


def _file_dtype(model: ModelConfig, part: str) -> torch.dtype:
    """Return the precision of a part in its file, that of its first weight; for a hub id that of its variant."""
    file = _single_file(model)
    files = [file] if file is not None and not _is_separate_vae(model, part) else _files(model, part)
    if not files:
        return (
            torch.float16 if _variant_suffix(model, part) is not None else torch.float32
        )  # most without variant are fp32
    with safe_open(files[0], framework="pt") as opened:
        names = list(opened.keys())
        of_part = [name for name in names if name.startswith(family_of(model).file_prefixes[part])]
        dtype: torch.dtype = opened.get_tensor((of_part or names)[0]).dtype
        return dtype


def _files(model: ModelConfig, part: str) -> list[Path]:
    """Return the files of a part in its folder; empty for a base that is not on disk."""
    vae = model.pretrained_vae_model_name_or_path if _is_separate_vae(model, part) else None
    folder = Path(base_path(model.pretrained_model_name_or_path), part) if vae is None else Path(vae)
    suffix = _variant_suffix(model, part)
    return sorted(path for path in folder.glob("*.safetensors") if suffix is None or suffix in path.name)


def _is_separate_vae(model: ModelConfig, part: str) -> bool:
    return part == "vae" and model.pretrained_vae_model_name_or_path is not None


def _variant_suffix(model: ModelConfig, part: str) -> str | None:
    """Return the part of the file names that marks the variant, or None."""
    return f".{model.variant}." if model.variant is not None and not _is_separate_vae(model, part) else None
