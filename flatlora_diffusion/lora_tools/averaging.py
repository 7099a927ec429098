"""Averages several LoRAs of one base into one LoRA: the weighted mean of their weight updates."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from flatlora_diffusion.adapter.delta import Update, Updates, cut_to_rank
from flatlora_diffusion.adapter.layers import PARTS
from flatlora_diffusion.config import AverageConfig, ConfigError
from flatlora_diffusion.lora_files.loading import embedding_files
from flatlora_diffusion.lora_files.metadata import portable_metadata
from flatlora_diffusion.lora_files.paths import lora_file, run_of
from flatlora_diffusion.lora_files.reading import ImportedLora
from flatlora_diffusion.lora_tools.converting import (
    WrittenFile,
    input_paths,
    read_lora_file,
    source_dtype,
    write_lora,
)
from flatlora_diffusion.lora_tools.outputs import check_embeddings_output, check_lora_output, write_errors
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.run_dir import LORA_FILE
from flatlora_diffusion.storage.tensor_io import save_tensors


class Average(NamedTuple):
    """The averaged updates, and the truncation error ||average - truncated||_F / ||average||_F, 0 if not truncated."""

    updates: dict[str, dict[str, Update]]
    lost: float


class AveragedFile(NamedTuple):
    """The file of an average, its highest rank, its truncation error, and the file of new tokens' embeddings."""

    written: WrittenFile
    rank: int
    lost: float
    embeddings: Path | None


def average_loras(config: AverageConfig) -> AveragedFile:
    """Write the average of the LoRAs and verify the file. Raises ConfigError for wrong input."""
    path = Path(config.output)
    files = _input_files(config)
    weights = normalize_weights(config.weights, len(files))
    embeddings_path = path.with_name(f"{path.stem}_emb.safetensors")
    inputs = [input_path for file in files for input_path in (*input_paths(file, config.base), *embedding_files(file))]
    check_lora_output(path, config.overwrite, inputs)
    members = [read_lora_file(str(file), config.base) for file in files]
    names = _display_names(files)
    _check_same_base(members, names, config.base)
    _check_same_layers(members, names)
    embeddings = _average_embeddings(files, names, weights)
    if embeddings:
        check_embeddings_output(embeddings_path, config.overwrite, inputs)
    total_rank = sum(_max_rank(member.updates) for member in members)
    if config.rank is not None and config.rank > total_rank:
        raise ConfigError(
            f"rank={config.rank} exceeds {total_rank}, the sum of the LoRAs' ranks; omit it for the exact average"
        )
    scaled = [config.strength * weight for weight in weights]
    average = average_updates([member.updates for member in members], scaled, config.rank)
    metadata = averaged_metadata(members, names, weights, config.strength, path.stem)
    dtype = config.dtype or source_dtype(members[0])
    written = write_lora(average.updates, members[0].base, path, config.layout, dtype, metadata)
    if embeddings:
        with write_errors(embeddings_path):
            save_tensors(embeddings_path, embeddings)
    return AveragedFile(written, _max_rank(average.updates), average.lost, embeddings_path if embeddings else None)


def average_updates(members: Sequence[Updates], weights: Sequence[float], rank: int | None = None) -> Average:
    """Compute sum_i w_i s_i B_i A_i for each layer, as fp32 factors of scale 1.

    The factors are concatenated, so the average is exact and its rank is the sum of the members' ranks.

    Args:
        members: The updates of each LoRA; all adapt the same layers.
        weights: The w_i, not normalized here.
        rank: Truncate each layer by SVD to the best approximation of at most this rank.
    """
    averaged: dict[str, dict[str, Update]] = {}
    lost, whole = 0.0, 0.0
    for part in PARTS:
        for module in members[0].get(part, {}):
            update = _concatenate([member[part][module] for member in members], weights)
            if rank is not None:
                update, values = cut_to_rank(update, rank)
                lost += float(values[rank:].square().sum())
                whole += float(values.square().sum())
            averaged.setdefault(part, {})[module] = update
    return Average(averaged, math.sqrt(lost / whole) if whole else 0.0)


def normalize_weights(weights: Sequence[float], count: int) -> list[float]:
    """Divide `weights` of `count` LoRAs by their sum; equal weights if none are given. Raises ConfigError."""
    if not weights:
        return [1 / count] * count
    text = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ConfigError(f"weights={text} has {len(weights)} values for {count} LoRAs; give a weight for each LoRA")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        raise ConfigError(f"weights={text} must be finite and not negative, with a sum above 0")
    return [weight / sum(weights) for weight in weights]


def averaged_metadata(
    members: Sequence[ImportedLora], names: Sequence[str], weights: Sequence[float], strength: float, name: str
) -> dict[str, str]:
    """Merge the metadata on which all members agree with a record of the members; the file is called `name`."""
    labels = members[0].base.labels
    first, *others = [portable_metadata(member.file.metadata, name, labels) for member in members]
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    parts = [
        {"name": member_name, "sha256": file_sha256(member.file.path), "weight": round(weight, 6)}
        for member_name, member, weight in zip(names, members, weights, strict=True)
    ]
    scale = "" if strength == 1 else f" at strength {strength:g}"
    listing = ", ".join(f"{part['name']} {part['weight']:.3g}" for part in parts)
    return {
        **shared,
        "ss_training_comment": f"flatlora-diffusion: average of {len(members)} LoRAs{scale} ({listing})",
        "flatlora.average": json.dumps({"strength": strength, "members": parts}),
    }


def _concatenate(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """Stack the rows of A and the columns of B, with each scale and weight multiplied into its B."""
    down = torch.cat([update.down for update in updates])
    ups = (update.up * (update.scale * weight) for update, weight in zip(updates, weights, strict=True))
    return Update(down, torch.cat(list(ups), dim=1), 1.0)


def _max_rank(updates: Updates) -> int:
    return max(len(update.down) for layers in updates.values() for update in layers.values())


def _input_files(config: AverageConfig) -> list[Path]:
    """Resolve the LoRA files. Raises ConfigError for fewer than two and for duplicates."""
    if len(config.loras) < 2:
        raise ConfigError(f"loras has {len(config.loras)} LoRA(s); give two or more: average A B")
    files = [lora_file(text) for text in config.loras]
    hashes = Counter(file_sha256(file) for file in files)
    for file in files:
        if hashes[file_sha256(file)] > 1:
            raise ConfigError(
                f"loras contains {file} more than once; give it once, with a higher value in --weights if intended"
            )
    return files


def _display_names(files: Sequence[Path]) -> list[str]:
    """The name of each file, or of the run folder that it is in; numbered if names repeat."""
    names = [file.resolve().parent.name if file.name == LORA_FILE else file.stem for file in files]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, 1)]


def _check_same_base(members: Sequence[ImportedLora], names: Sequence[str], base: str | None) -> None:
    """Raise ConfigError if shapes or base weights differ, or base names if `base` is not given."""
    bases = {member.base.base for member in members}
    if len(bases) > 1:
        raise ConfigError(f"loras are for {len(bases)} bases ({', '.join(sorted(bases))}); give LoRAs of one base")
    base_names = [member.file.metadata.get("ss_sd_model_name") for member in members]
    for kind, values in (("weights", [_base_hash(member.file.path) for member in members]), ("names", base_names)):
        known = {name: value for name, value in zip(names, values, strict=True) if value is not None}
        if len(set(known.values())) < 2 or (kind == "names" and base is not None):
            continue
        listing = ", ".join(f"{name} on {value}" for name, value in known.items())
        advice = "" if kind == "weights" else "; if the weights are the same, give --base"
        raise ConfigError(
            f"loras were trained on bases of different {kind} ({listing}); give LoRAs of one base{advice}"
        )


def _base_hash(file: Path) -> str | None:
    """The hash of the UNet that a LoRA was trained on, if the file lies in its run folder."""
    events = [] if (run := run_of(file)) is None else run.events()
    return next((event["base"] for event in events if event["event"] == "start" and "base" in event), None)


def _check_same_layers(members: Sequence[ImportedLora], names: Sequence[str]) -> None:
    """Raise ConfigError if a LoRA adapts a layer that another does not."""
    first, *others = [
        {f"{part}.{module}" for part, modules in member.updates.items() for module in modules} for member in members
    ]
    for layers, name in zip(others, names[1:], strict=True):
        for missing, lacking in ((first - layers, name), (layers - first, names[0])):
            if missing:
                raise ConfigError(
                    f"loras adapt different layers: {lacking} lacks {len(missing)}, such as {min(missing)}; "
                    "give LoRAs that were trained on the same layers"
                )


def _average_embeddings(files: Sequence[Path], names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Average the embeddings of new tokens; empty if no LoRA has any. Raises ConfigError."""
    embeddings = [embedding_files(file) for file in files]
    if not any(embeddings):
        return {}
    for name, candidates in zip(names, embeddings, strict=True):
        if len(candidates) != 1:
            raise ConfigError(
                f"loras: {name} has {len(candidates)} files of new tokens beside it and another LoRA has some; an "
                "average needs one file *_emb.safetensors for each LoRA, or for none"
            )
    tables = [load_file(file) for [file] in embeddings]
    shapes: list[Mapping[str, tuple[int, ...]]] = [
        {key: tuple(value.shape) for key, value in table.items()} for table in tables
    ]
    for name, table_shapes in zip(names, shapes, strict=True):
        if table_shapes != shapes[0]:
            raise ConfigError(f"loras: {name} has other new tokens than {names[0]}; give LoRAs with the same tokens")
    return {
        key: sum(weight * table[key].float() for weight, table in zip(weights, tables, strict=True))  # type: ignore[misc]
        for key in tables[0]
    }
