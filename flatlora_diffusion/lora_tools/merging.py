"""A base with LoRAs added to its weights, as a diffusers folder or as one checkpoint with the original names."""

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

from flatlora_diffusion.adapter.delta import PARTS, Update
from flatlora_diffusion.config import ConfigError, MergeConfig, ModelConfig, RunError
from flatlora_diffusion.lora_files.loading import embeddings_beside
from flatlora_diffusion.lora_files.names import shared_layers
from flatlora_diffusion.lora_files.paths import LoraFile, parse_lora
from flatlora_diffusion.lora_tools.converting import read_lora_file
from flatlora_diffusion.lora_tools.outputs import (
    check_checkpoint_output,
    check_model_output,
    replace_folder,
    written_to,
)
from flatlora_diffusion.sdxl.device import DTYPES
from flatlora_diffusion.sdxl.loading import base_given_as, base_path, load_pipeline
from flatlora_diffusion.sdxl.single_file import PREFIXES, save_single_file

logger = logging.getLogger(__name__)

_STORED = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Weighted(NamedTuple):
    layers: Mapping[str, Update]  # which are read one at a time
    strength: float


def merge_loras(config: MergeConfig) -> Path:
    """Write the merged model and return its path. Raises ConfigError for wrong input, RunError for an overflow."""
    output, files = Path(config.output), [file for text in config.lora for file in parse_lora(text)]
    _check(config, output, files)
    dtypes = stored_dtypes(base_path(config.base))
    if config.dtype is not None:
        dtypes = dict.fromkeys(dtypes, DTYPES[config.dtype])
    model = ModelConfig(pretrained_model_name_or_path=config.base, single_file_config=config.single_file_config)
    with base_given_as("base"):
        pipeline: Any = load_pipeline(model, torch.device("cpu"), widest(dtypes))
    merge_into(pipeline, files, config.single_file_config or config.base, dtypes)
    for part, dtype in dtypes.items():
        getattr(pipeline, part).to(dtype)
    save = save_single_file if config.single_file else _save_folder
    with written_to(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        return save(pipeline, output)


@torch.no_grad()
def merge_into(pipeline: Any, files: Sequence[LoraFile], base: str | None, dtypes: Mapping[str, torch.dtype]) -> None:
    """Add the LoRAs to the pipeline's weights: W + sum of strength * scale * B A, in fp32, one layer at a time.

    Raises RunError for a sum that overflows the dtype that its part is to have.
    """
    wanted: dict[tuple[str, str], list[_Weighted]] = {}
    for file in files:
        _warn_of_embeddings(file.path)
        for part, layers in read_lora_file(str(file.path), base).updates.items():
            for module in layers:
                wanted.setdefault((part, module), []).append(_Weighted(layers, file.weight))
    for part in PARTS:
        for module, layer in shared_layers(part, getattr(pipeline, part)).items():
            if (part, module) not in wanted:
                continue
            merged = layer.weight.float()
            for layers, strength in wanted[part, module]:
                down, up, scale = layers[module]
                merged = merged + (strength * scale * (up.flatten(1) @ down.flatten(1))).view_as(merged)
            merged = merged.to(dtypes[part])
            if not bool(merged.isfinite().all()):
                raise RunError(f"{part}.{module} overflows {merged.dtype}; use --dtype bf16 or fp32")
            layer.weight.copy_(merged)


def stored_dtypes(path: str) -> dict[str, torch.dtype]:
    """The commonest dtype on disk of each part of a base, a folder or a single file; fp16 for a hub id."""
    return {part: _stored_dtype(Path(path), part) for part in PREFIXES}


def widest(dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The one that holds all of them exactly, the VAE's aside: that is always loaded in fp32."""
    used = {dtype for part, dtype in dtypes.items() if part != "vae"}
    return used.pop() if len(used) == 1 else torch.float32


def _stored_dtype(place: Path, part: str) -> torch.dtype:
    prefix = PREFIXES[part] if place.is_file() else ""
    # A dot in a stem is that of a variant, such as .fp16, which is not loaded.
    files = (
        [place] if place.is_file() else [file for file in (place / part).glob("*.safetensors") if "." not in file.stem]
    )
    counts: Counter[torch.dtype] = Counter()
    for file in files:
        counts.update(dtype for name, dtype in _dtypes(file).items() if name.startswith(prefix))
    return counts.most_common(1)[0][0] if counts else torch.float16


def _dtypes(file: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor; none for a damaged file, of which loading it will say more."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {
                name: _STORED.get(opened.get_slice(name).get_dtype(), torch.float16)
                for name in opened.keys()  # noqa: SIM118 (not a dict)
            }
    except (OSError, SafetensorError):
        return {}


def _check(config: MergeConfig, output: Path, files: Sequence[LoraFile]) -> None:
    for name in ("base", "lora", "output"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing; see `merge --help`")
    if config.single_file != (output.suffix == ".safetensors"):
        kind = "a .safetensors file" if config.single_file else "a folder (or give --single_file)"
        raise ConfigError(f"output={config.output!r} must be {kind}")
    check = check_checkpoint_output if config.single_file else check_model_output
    places = [base_path(config.base), *filter(None, [config.single_file_config])]
    check(output, config.overwrite, [*map(Path, places), *(file.path for file in files)])


def _save_folder(pipeline: Any, output: Path) -> Path:
    """Written aside and renamed, so that an interrupted merge leaves no half model under that name."""
    aside = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        pipeline.save_pretrained(aside)
        replace_folder(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return output


def _warn_of_embeddings(path: Path) -> None:
    if embeddings_beside(path):
        logger.warning("%s has new tokens in a file beside it; they are not merged", path.name)
