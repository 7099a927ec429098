"""LoRAs by singular values: one of a lower rank from a LoRA, or a new one from two models; with what is lost."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.adapter.delta import PARTS, Update, cut_to_rank, truncated_svd
from flatlora_diffusion.config import ConfigError, ExtractConfig, FileLayout, ModelConfig, ResizeConfig
from flatlora_diffusion.lora_files.metadata import kept_metadata
from flatlora_diffusion.lora_files.names import DIFFUSERS_STYLES, BaseNames, base_names, shared_layers
from flatlora_diffusion.lora_files.paths import lora_file
from flatlora_diffusion.lora_files.safe_reading import listed
from flatlora_diffusion.lora_tools.converting import (
    Written,
    output_file,
    own_dtype,
    read_for,
    read_lora_file,
    write_lora,
)
from flatlora_diffusion.lora_tools.merging import stored_dtypes, widest
from flatlora_diffusion.lora_tools.outputs import check_lora_output
from flatlora_diffusion.sdxl.family import family_of
from flatlora_diffusion.sdxl.loading import base_given_as, base_path, load_pipeline

logger = logging.getLogger(__name__)


class Reduced(NamedTuple):
    """A file, and what of the whole change it misses, ||missed||_F / ||change||_F."""

    written: Written
    missed: float


def resize_lora(config: ResizeConfig) -> Reduced:
    """Write the best LoRA with at most this rank in each layer, in the layout of the old one."""
    source = lora_file(config.file)
    path = output_file(config.output, source, f"{source.stem}_rank{config.rank}.safetensors")
    check_lora_output(path, config.overwrite, read_for(source, config.base))
    lora = read_lora_file(str(source), config.base)
    missed, whole = 0.0, 0.0
    resized: dict[str, dict[str, Update]] = {}
    for part, layers in lora.updates.items():
        for module, update in layers.items():
            smaller, values = cut_to_rank(update, config.rank)
            resized.setdefault(part, {})[module] = smaller
            missed += float(values[len(smaller.down) :].square().sum())
            whole += float(values.square().sum())
    layout: FileLayout = "diffusers" if lora.layers[0].place.style in DIFFUSERS_STYLES else "kohya"
    metadata = kept_metadata(lora.file.metadata, path.stem, family_of(lora.base.unet))
    written = write_lora(resized, lora.base, path, layout, config.dtype or own_dtype(lora), metadata)
    return Reduced(written, math.sqrt(missed / whole))


def extract_lora(config: ExtractConfig) -> Reduced:
    """Write the best LoRA of this rank for the difference of two models."""
    path = Path(config.output)
    for name in ("base", "tuned"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing; see `extract --help`")
    places = [base_path(config.base), base_path(config.tuned), *filter(None, [config.single_file_config])]
    check_lora_output(path, config.overwrite, map(Path, places))
    base, tuned = _loaded("base", config), _loaded("tuned", config)
    missed, whole = 0.0, 0.0
    extracted: dict[str, dict[str, Update]] = {}
    for part in PARTS:
        before, after = (shared_layers(part, getattr(model, part)) for model in (base, tuned))
        _check_same(before, after, part, config)
        states = [getattr(model, part).state_dict() for model in (base, tuned)]
        _warn_of_others(part, states[0], states[1], set(before))
        for module, layer in before.items():
            change = (after[module].weight.float() - layer.weight.float()).detach()
            if not bool(change.any()):
                continue
            update = _factors(change, config.rank)
            extracted.setdefault(part, {})[module] = update
            rest = change - (update.up.flatten(1) @ update.down.flatten(1)).view_as(change)
            missed += float(rest.double().square().sum())
            whole += float(change.double().square().sum())
    if not extracted:
        raise ConfigError(f"tuned={config.tuned!r} has the weights of the base: there is nothing to extract")
    names: BaseNames = base_names(config.single_file_config or config.base)
    metadata = kept_metadata({}, path.stem, family_of(names.unet))
    return Reduced(
        write_lora(extracted, names, path, config.layout, config.dtype, metadata), math.sqrt(missed / whole)
    )


def _loaded(setting: str, config: ExtractConfig) -> Any:
    name = getattr(config, setting)
    files = [model for model in (config.base, config.tuned) if model.lower().endswith(".safetensors")]
    # Where neither is a file, loading says so.
    folder = config.single_file_config if name in files or not files else None
    model = ModelConfig(pretrained_model_name_or_path=name, single_file_config=folder)
    with base_given_as(setting):
        return load_pipeline(model, torch.device("cpu"), widest(stored_dtypes(base_path(name))))


def _check_same(before: dict[str, Any], after: dict[str, Any], part: str, config: ExtractConfig) -> None:
    shapes = [{name: layer.weight.shape for name, layer in layers.items()} for layers in (before, after)]
    if shapes[0] != shapes[1]:
        raise ConfigError(f"tuned={config.tuned!r} has another {part} than the base, so their difference is no LoRA")


def _warn_of_others(part: str, before: dict[str, Tensor], after: dict[str, Tensor], layers: set[str]) -> None:
    """Say what a LoRA of the layers' weights cannot hold: biases, norms and embeddings that differ."""
    weights = {f"{layer}.weight" for layer in layers} | {
        f"{layer.removeprefix('text_model.')}.weight" for layer in layers
    }
    others = [name for name, value in before.items() if name not in weights and not torch.equal(value, after[name])]
    if others:
        logger.warning("%d tensor(s) of the %s differ that no LoRA can hold: %s", len(others), part, listed(others))


def _factors(change: Tensor, rank: int) -> Update:
    """`truncated_svd` in the shapes that a layer's factors have."""
    down, up, _ = truncated_svd(change.flatten(1), rank)
    rest = [1] * (change.ndim - 2)
    return Update(down.view(len(down), *change.shape[1:]), up.view(len(up), -1, *rest), 1.0)
