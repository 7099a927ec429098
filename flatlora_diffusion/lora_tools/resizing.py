"""Low-rank approximation by SVD: resizes a LoRA to a lower rank, or extracts a LoRA from two models."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flatlora_diffusion.adapter.delta import Update, cut_to_rank, truncated_svd
from flatlora_diffusion.adapter.layers import parts_of
from flatlora_diffusion.config import ConfigError, ExtractConfig, FileLayout, ModelConfig, ResizeConfig
from flatlora_diffusion.families.paths import base_given_as, base_path
from flatlora_diffusion.families.registry import family_of, load_base
from flatlora_diffusion.lora_files.metadata import portable_metadata
from flatlora_diffusion.lora_files.names import DIFFUSERS_STYLES, BaseNames, adaptable_layers, base_names
from flatlora_diffusion.lora_files.paths import lora_file
from flatlora_diffusion.lora_files.safe_reading import shortlist
from flatlora_diffusion.lora_tools.converting import (
    WrittenFile,
    input_paths,
    output_file,
    read_lora_file,
    source_dtype,
    write_lora,
)
from flatlora_diffusion.lora_tools.merging import stored_dtypes, widest_dtype
from flatlora_diffusion.lora_tools.outputs import check_lora_output

logger = logging.getLogger(__name__)


class ReducedFile(NamedTuple):
    """A written file, and its approximation error ||change - approximation||_F / ||change||_F."""

    written: WrittenFile
    missed: float


def resize_lora(config: ResizeConfig) -> ReducedFile:
    """Write the best approximation of at most this rank in each layer, in the source's layout."""
    source = lora_file(config.file)
    path = output_file(config.output, source, f"{source.stem}_rank{config.rank}.safetensors")
    check_lora_output(path, config.overwrite, input_paths(source, config.base))
    lora = read_lora_file(str(source), config.base)
    missed, whole = 0.0, 0.0
    resized: dict[str, dict[str, Update]] = {}
    for part, layers in lora.updates.items():
        for module, update in layers.items():
            smaller, values = cut_to_rank(update, config.rank)
            resized.setdefault(part, {})[module] = smaller
            missed += float(values[len(smaller.down) :].square().sum())
            whole += float(values.square().sum())
    layout: FileLayout = "diffusers" if lora.layers[0].target.style in DIFFUSERS_STYLES else "kohya"
    metadata = portable_metadata(lora.file.metadata, path.stem, lora.base.labels)
    written = write_lora(resized, lora.base, path, layout, config.dtype or source_dtype(lora), metadata)
    return ReducedFile(written, math.sqrt(missed / whole))


def extract_lora(config: ExtractConfig) -> ReducedFile:
    """Write the best LoRA of this rank for the difference of two models' weights."""
    path = Path(config.output)
    for name in ("base", "tuned"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing; see `extract --help`")
    inputs = [base_path(config.base), base_path(config.tuned), *filter(None, [config.single_file_config])]
    check_lora_output(path, config.overwrite, map(Path, inputs))
    _check_one_family(config)
    base, tuned = _load_model("base", config), _load_model("tuned", config)
    missed, whole = 0.0, 0.0
    extracted: dict[str, dict[str, Update]] = {}
    for part in parts_of(base):
        before, after = (adaptable_layers(part, getattr(model, part)) for model in (base, tuned))
        _check_same_shapes(before, after, part, config)
        states = [getattr(model, part).state_dict() for model in (base, tuned)]
        _warn_about_other_changes(part, states[0], states[1], set(before))
        for module, layer in before.items():
            change = (after[module].weight.float() - layer.weight.float()).detach()
            if not bool(change.any()):
                continue
            update = _truncated_update(change, config.rank)
            extracted.setdefault(part, {})[module] = update
            rest = change - (update.up.flatten(1) @ update.down.flatten(1)).view_as(change)
            missed += float(rest.double().square().sum())
            whole += float(change.double().square().sum())
    if not extracted:
        raise ConfigError(f"tuned={config.tuned!r} has the same weights as the base; give a fine-tuned model")
    names: BaseNames = base_names(config.single_file_config or config.base)
    metadata = portable_metadata({}, path.stem, names.labels)
    return ReducedFile(
        write_lora(extracted, names, path, config.layout, config.dtype, metadata), math.sqrt(missed / whole)
    )


def _check_one_family(config: ExtractConfig) -> None:
    models = [ModelConfig(name, single_file_config=config.single_file_config) for name in (config.base, config.tuned)]
    base, tuned = (family_of(model).name for model in models)
    if base != tuned:
        raise ConfigError(
            f"tuned={config.tuned!r} is {tuned}, and base={config.base!r} {base}; give a fine-tuned model of this base"
        )


def _load_model(setting: str, config: ExtractConfig) -> Any:
    name = getattr(config, setting)
    files = [model for model in (config.base, config.tuned) if model.lower().endswith(".safetensors")]
    # If neither is a single file, loading rejects the setting.
    folder = config.single_file_config if name in files or not files else None
    model = ModelConfig(pretrained_model_name_or_path=name, single_file_config=folder)
    with base_given_as(setting):
        return load_base(model, torch.device("cpu"), widest_dtype(stored_dtypes(base_path(name)))).pipeline


def _check_same_shapes(before: dict[str, Any], after: dict[str, Any], part: str, config: ExtractConfig) -> None:
    shapes = [{name: layer.weight.shape for name, layer in layers.items()} for layers in (before, after)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"tuned={config.tuned!r} has a {part} of other shapes than the base; give a fine-tuned model of this base"
        )


def _warn_about_other_changes(
    part: str, before: dict[str, Tensor], after: dict[str, Tensor], layers: set[str]
) -> None:
    """Warn about changed biases, norms and embeddings, which a LoRA cannot represent."""
    weights = {f"{path}.weight" for layer in layers for path in (layer, layer.removeprefix("text_model."))}
    others = [name for name, value in before.items() if name not in weights and not torch.equal(value, after[name])]
    if others:
        logger.warning(
            "Ignoring %d changed tensor(s) of the %s that a LoRA cannot represent: %s",
            len(others),
            part,
            shortlist(others),
        )


def _truncated_update(change: Tensor, rank: int) -> Update:
    """Truncate a weight change of any shape by SVD."""
    down, up, _ = truncated_svd(change.flatten(1), rank)
    rest = [1] * (change.ndim - 2)
    return Update(down.view(len(down), *change.shape[1:]), up.view(len(up), -1, *rest), 1.0)
