"""How much memory of the CPU a run on a GPU will need: while the base is loaded, and in its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from flatlora_diffusion.config import TEXT_PARTS, ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.memory.estimate import in_gib, resolution_of
from flatlora_diffusion.memory.meta_step import weight_count
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.sdxl.loading import base_path
from flatlora_diffusion.sdxl.shapes import TOKENS, part_settings, vae_factor
from flatlora_diffusion.sdxl.single_file import PREFIXES

_POSTERIOR = 2 * 2 * 4  # mean and std, plain and mirrored, in fp32


@dataclass(frozen=True)
class CpuEstimate:
    """Bytes of one process, beyond what Python and its packages take.

    loading: the base, whole before it goes to the GPU, and beside it what of its file is in another precision.
    class_images: the same in the precision in which class images are drawn, before the run's own base is loaded.
    offloaded: what --offload keeps through the steps. latents, prompts: the caches.
    """

    loading: int
    class_images: int
    offloaded: int
    latents: int
    prompts: int

    @property
    def total(self) -> int:
        """The peak of the whole run."""
        return max(self.loading, self.class_images, self.offloaded + self.latents + self.prompts)


def estimate_cpu_memory(config: TrainConfig, samples: Sequence[Sample]) -> CpuEstimate:
    """What a run on `samples` needs beside its GPU; a base that is not on disk counts as SDXL."""
    model, data = config.model, config.data
    dtype = DTYPES[config.optim.precision_of_base]
    squares = data.num_class_images if data.with_prior_preservation and not data.use_aspect_ratio_buckets else 0
    is_cached = data.cache_latents and (squares > 0 or not data.with_prior_preservation)
    offloaded = (*(() if config.encodes_in_steps else TEXT_PARTS), *(("vae",) if is_cached else ()))
    captions = {sample.caption for sample in samples}
    if data.with_prior_preservation or config.objective.prior_from_base:
        captions.add(str(data.class_prompt))
    side, channels = resolution_of(config) // vae_factor(model), int(part_settings(model, "vae")["latent_channels"])
    of_class = DTYPES[data.prior_generation_precision or "fp16"]
    return CpuEstimate(
        loading=_loading(model, dtype),
        class_images=_loading(model, of_class) if data.with_prior_preservation else 0,
        offloaded=sum(weight_count(model, part) * _loaded_as(part, dtype).itemsize for part in offloaded)
        if model.offload
        else 0,
        latents=(len(samples) + squares) * _POSTERIOR * channels * side**2 if data.cache_latents else 0,
        prompts=0 if config.encodes_in_steps else len(captions) * _prompt_numbers(model) * dtype.itemsize,
    )


def cpu_lines(config: TrainConfig, samples: Sequence[Sample], available_bytes: int) -> list[str]:
    """What to tell before a run on a GPU of the CPU's memory: the need, and what lowers it if need be."""
    need = estimate_cpu_memory(config, samples)
    lines = [f"about {in_gib(need.total)} of CPU memory needed, {in_gib(available_bytes)} free"]
    if need.total <= available_bytes:
        return lines
    while_loading = (
        "it is needed while the base is loaded: end what else runs, or give a base whose files need no cast, being "
        "in the precision of --mixed_precision"
    )
    is_loading = need.total in (need.loading, need.class_images)
    lines.append(f"- {while_loading if is_loading else 'it is needed for the caches: leave --cache_latents out'}")
    return lines


def _loading(model: ModelConfig, dtype: torch.dtype) -> int:
    """All weights as they are loaded, and what is cast for them.

    A file whose weights need no cast is mapped, and its pages are the weights. Of a folder one model's file is open at
    a time, of a single file all of it (measured with diffusers 0.42: 690 MiB in fp32 take 1,044 MiB to load in fp16).
    """
    counts = {part: weight_count(model, part) for part in PREFIXES}
    cast = [
        _file_bytes(model, part, counts) for part in PREFIXES if _file_dtype(model, part) != _loaded_as(part, dtype)
    ]
    held = sum(cast) if _single_file(model) is not None else max(cast, default=0)
    return sum(counts[part] * _loaded_as(part, dtype).itemsize for part in PREFIXES) + int(held)


def _loaded_as(part: str, dtype: torch.dtype) -> torch.dtype:
    """The precision of a part that is loaded; the VAE is in fp32."""
    return torch.float32 if part == "vae" else dtype


def _single_file(model: ModelConfig) -> Path | None:
    file = Path(base_path(model.pretrained_model_name_or_path))
    return file if file.is_file() else None


def _file_bytes(model: ModelConfig, part: str, counts: dict[str, int]) -> float:
    """Bytes of a part in its file; of a hub's base as its variant says, since most that have none are fp32."""
    file = _single_file(model)
    if file is not None and not _has_its_own(model, part):
        return file.stat().st_size * counts[part] / sum(counts.values())
    return sum(one.stat().st_size for one in _files(model, part)) or counts[part] * _file_dtype(model, part).itemsize


def _file_dtype(model: ModelConfig, part: str) -> torch.dtype:
    """The precision of a part in its file, which the first of its weights stands for."""
    file = _single_file(model)
    files = [file] if file is not None and not _has_its_own(model, part) else _files(model, part)
    if not files:
        return torch.float16 if _mark(model, part) is not None else torch.float32
    with safe_open(files[0], framework="pt") as opened:
        names = list(opened.keys())
        its_own = [name for name in names if name.startswith(PREFIXES[part])]
        dtype: torch.dtype = opened.get_tensor((its_own or names)[0]).dtype
        return dtype


def _files(model: ModelConfig, part: str) -> list[Path]:
    """The files of a part in its folder; none of a base that is not on disk."""
    own = model.pretrained_vae_model_name_or_path if _has_its_own(model, part) else None
    folder = Path(base_path(model.pretrained_model_name_or_path), part) if own is None else Path(own)
    mark = _mark(model, part)
    return sorted(one for one in folder.glob("*.safetensors") if mark is None or mark in one.name)


def _has_its_own(model: ModelConfig, part: str) -> bool:
    return part == "vae" and model.pretrained_vae_model_name_or_path is not None


def _mark(model: ModelConfig, part: str) -> str | None:
    """What is in the names of the variant's files."""
    return f".{model.variant}." if model.variant is not None and not _has_its_own(model, part) else None


def _prompt_numbers(model: ModelConfig) -> int:
    """Of one caption's embeddings: 77 of both encoders side by side, and the pooled one of the second."""
    first, second = (part_settings(model, part) for part in TEXT_PARTS)
    return int(TOKENS * (first["hidden_size"] + second["hidden_size"]) + second["projection_dim"])
