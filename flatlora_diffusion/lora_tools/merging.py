"""Merges LoRAs into a base's weights and saves a diffusers folder or a single-file checkpoint in the SGM layout."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from flatlora_diffusion.adapter.delta import Update
from flatlora_diffusion.adapter.layers import parts_of
from flatlora_diffusion.config import ConfigError, MergeConfig, ModelConfig, RunError, function_at
from flatlora_diffusion.families.device import DTYPES
from flatlora_diffusion.families.family import Family
from flatlora_diffusion.families.paths import base_given_as, base_path
from flatlora_diffusion.families.registry import family_of, load_base
from flatlora_diffusion.lora_files.loading import embedding_files
from flatlora_diffusion.lora_files.names import adaptable_layers
from flatlora_diffusion.lora_files.paths import LoraFile, parse_lora
from flatlora_diffusion.lora_tools.converting import read_lora_file
from flatlora_diffusion.lora_tools.outputs import (
    check_checkpoint_output,
    check_model_output,
    replace_folder,
    write_errors,
)

logger = logging.getLogger(__name__)

_DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _WeightedLayers(NamedTuple):
    layers: Mapping[str, Update]  # read one at a time
    strength: float


def merge_loras(config: MergeConfig) -> Path:
    """Write the merged model and return its path.

    Raises:
        ConfigError: The input is wrong.
        RunError: A merged weight overflows its dtype.
    """
    output, files = Path(config.output), [file for text in config.lora for file in parse_lora(text)]
    _check_config(config, output, files)
    model = ModelConfig(pretrained_model_name_or_path=config.base, single_file_config=config.single_file_config)
    family = family_of(model)
    if config.single_file and family.single_file_saver is None:
        raise ConfigError(f"--single_file is not supported on {family.name}; give a folder as --output instead")
    dtypes = stored_dtypes(base_path(config.base))
    if config.dtype is not None:
        dtypes = dict.fromkeys(dtypes, DTYPES[config.dtype])
    with base_given_as("base"):
        pipeline: Any = load_base(model, torch.device("cpu"), widest_dtype(dtypes)).pipeline
    merge_into(pipeline, files, config.single_file_config or config.base, dtypes)
    for part, dtype in dtypes.items():
        getattr(pipeline, part).to(dtype)
    save = function_at(str(family.single_file_saver)) if config.single_file else _save_folder
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        path: Path = save(pipeline, output)
        return path


@torch.no_grad()
def merge_into(pipeline: Any, files: Sequence[LoraFile], base: str | None, dtypes: Mapping[str, torch.dtype]) -> None:
    """Set each weight of the pipeline to W + sum of strength * scale * B A, computed in fp32, one layer at a time.

    Raises:
        RunError: A sum overflows the dtype of its part in `dtypes`.
    """
    loras: dict[tuple[str, str], list[_WeightedLayers]] = {}
    for file in files:
        _warn_about_embeddings(file.path)
        for part, layers in read_lora_file(str(file.path), base).updates.items():
            for module in layers:
                loras.setdefault((part, module), []).append(_WeightedLayers(layers, file.weight))
    for part in parts_of(pipeline):
        for module, layer in adaptable_layers(part, getattr(pipeline, part)).items():
            if (part, module) not in loras:
                continue
            merged = layer.weight.float()
            for layers, strength in loras[part, module]:
                down, up, scale = layers[module]
                merged = merged + (strength * scale * (up.flatten(1) @ down.flatten(1))).view_as(merged)
            merged = merged.to(dtypes[part])
            if not bool(merged.isfinite().all()):
                raise RunError(f"{part}.{module} overflows {merged.dtype}; use --dtype bf16 or fp32")
            layer.weight.copy_(merged)


def stored_dtypes(path: str) -> dict[str, torch.dtype]:
    """The most common dtype on disk of each part of a base folder or single file; fp16 for a hub id."""
    family = family_of(ModelConfig(path))
    return {part: _stored_dtype(Path(path), part, family) for part in family.parts}


def widest_dtype(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The dtype that represents all others exactly, except the VAE's, which is always loaded in fp32."""
    used = {dtype for part, dtype in dtypes.items() if part != "vae"}
    return used.pop() if len(used) == 1 else torch.float32


def _stored_dtype(base: Path, part: str, family: Family) -> torch.dtype:
    prefix = family.file_prefixes[part] if base.is_file() else ""
    # A dot in the stem marks a variant such as .fp16, which is not loaded.
    files = (
        [base] if base.is_file() else [file for file in (base / part).glob("*.safetensors") if "." not in file.stem]
    )
    counts: Counter[torch.dtype] = Counter()
    for file in files:
        counts.update(dtype for name, dtype in _tensor_dtypes(file).items() if name.startswith(prefix))
    return counts.most_common(1)[0][0] if counts else torch.float16


def _tensor_dtypes(file: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor; empty for a damaged file, which loading will report."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {
                name: _DTYPES.get(opened.get_slice(name).get_dtype(), torch.float16)
                for name in opened.keys()  # noqa: SIM118 (not a dict)
            }
    except (OSError, SafetensorError):
        return {}


def _check_config(config: MergeConfig, output: Path, files: Sequence[LoraFile]) -> None:
    for name in ("base", "lora", "output"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing; see `merge --help`")
    if config.single_file != (output.suffix == ".safetensors"):
        kind = "a .safetensors file" if config.single_file else "a folder (or give --single_file)"
        raise ConfigError(f"output={config.output!r} must be {kind}")
    check = check_checkpoint_output if config.single_file else check_model_output
    inputs = [base_path(config.base), *filter(None, [config.single_file_config])]
    check(output, config.overwrite, [*map(Path, inputs), *(file.path for file in files)])


def _save_folder(pipeline: Any, output: Path) -> Path:
    """Write to a temporary folder and rename it, so that an interrupted merge leaves no partial model."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        pipeline.save_pretrained(temporary)
        replace_folder(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _warn_about_embeddings(path: Path) -> None:
    if embedding_files(path):
        logger.warning("%s has embeddings of new tokens beside it, which are not merged", path.name)
