"""The average of several LoRAs of one base as one LoRA: the weighted mean of what each adds to the weights."""

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

from flatlora_diffusion.adapter.delta import PARTS, Update, Updates, cut_to_rank
from flatlora_diffusion.config import AverageConfig, ConfigError
from flatlora_diffusion.lora_files.loading import embeddings_beside
from flatlora_diffusion.lora_files.metadata import kept_metadata
from flatlora_diffusion.lora_files.paths import lora_file
from flatlora_diffusion.lora_files.reading import ImportedLora
from flatlora_diffusion.lora_files.safe_reading import listed
from flatlora_diffusion.lora_tools.converting import (
    Written,
    own_dtype,
    read_for,
    read_lora_file,
    write_lora,
)
from flatlora_diffusion.lora_tools.outputs import check_embeddings_output, check_lora_output, written_to
from flatlora_diffusion.sdxl.family import family_of
from flatlora_diffusion.storage.atomic_io import file_sha256
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.storage.tensor_io import save_tensors


class Average(NamedTuple):
    """The averaged updates, and the share that a cut lost: ||lost||_F / ||whole||_F over all layers, 0 without one."""

    updates: dict[str, dict[str, Update]]
    lost: float


class AveragedFile(NamedTuple):
    """The file of an average, its highest rank, the share that a cut lost, and its embeddings of new tokens if any."""

    written: Written
    rank: int
    lost: float
    embeddings: Path | None


def average_loras(config: AverageConfig) -> AveragedFile:
    """Write the average of the LoRAs and read it back. Raises ConfigError for wrong input."""
    path = Path(config.output)
    files = _files(config)
    weights = normalized(config.weights, len(files))
    beside = path.with_name(f"{path.stem}_emb.safetensors")
    read = [place for file in files for place in (*read_for(file, config.base), *embeddings_beside(file))]
    check_lora_output(path, config.overwrite, read)
    members = [read_lora_file(str(file), config.base) for file in files]
    names = _names(files)
    _check_same_base(members, names, config.base)
    _check_same_layers(members, names)
    embeddings = _average_embeddings(files, names, weights)
    if embeddings:
        check_embeddings_output(beside, config.overwrite, read)
    summed = sum(_rank(member.updates) for member in members)
    if config.rank is not None and config.rank > summed:
        raise ConfigError(
            f"rank={config.rank} is above {summed}, the sum of the LoRAs' ranks; leave it out for the exact average"
        )
    scaled = [config.strength * weight for weight in weights]
    average = average_updates([member.updates for member in members], scaled, config.rank)
    metadata = averaged_metadata(members, names, weights, config.strength, path.stem)
    dtype = config.dtype or own_dtype(members[0])
    written = write_lora(average.updates, members[0].base, path, config.layout, dtype, metadata)
    if embeddings:
        with written_to(beside):
            save_tensors(beside, embeddings)
    return AveragedFile(written, _rank(average.updates), average.lost, beside if embeddings else None)


def average_updates(members: Sequence[Updates], weights: Sequence[float], rank: int | None = None) -> Average:
    """sum_i w_i s_i B_i A_i for each layer, with the `weights` w_i as given; fp32 factors of scale 1.

    The factors stand side by side, so the rank is the sum of the members' ranks and the average is exact. With `rank`
    each layer is cut by SVD to the best LoRA of at most that rank. All members must adapt the same layers.
    """
    averaged: dict[str, dict[str, Update]] = {}
    lost, whole = 0.0, 0.0
    for part in PARTS:
        for module in members[0].get(part, {}):
            update = _side_by_side([member[part][module] for member in members], weights)
            if rank is not None:
                update, values = cut_to_rank(update, rank)
                lost += float(values[rank:].square().sum())
                whole += float(values.square().sum())
            averaged.setdefault(part, {})[module] = update
    return Average(averaged, math.sqrt(lost / whole) if whole else 0.0)


def normalized(weights: Sequence[float], count: int) -> list[float]:
    """`weights` of `count` LoRAs divided by their sum; all alike where none is given. Raises ConfigError."""
    if not weights:
        return [1 / count] * count
    said = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != count:
        raise ConfigError(f"weights={said} are {len(weights)} weights for {count} LoRAs; give one for each")
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or sum(weights) <= 0:
        raise ConfigError(f"weights={said} must be finite, none below 0 and their sum above 0")
    return [weight / sum(weights) for weight in weights]


def averaged_metadata(
    members: Sequence[ImportedLora], names: Sequence[str], weights: Sequence[float], strength: float, name: str
) -> dict[str, str]:
    """What all members' metadata agree on, and what the file is made of; it is called `name`."""
    family = family_of(members[0].base.unet)
    first, *others = [kept_metadata(member.file.metadata, name, family) for member in members]
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    parts = [
        {"name": own, "sha256": file_sha256(member.file.path), "weight": round(weight, 6)}
        for own, member, weight in zip(names, members, weights, strict=True)
    ]
    at = "" if strength == 1 else f" at strength {strength:g}"
    said = ", ".join(f"{part['name']} {part['weight']:.3g}" for part in parts)
    return {
        **shared,
        "ss_training_comment": f"flatlora-diffusion: average of {len(members)} LoRAs{at} ({said})",
        "flatlora.average": json.dumps({"strength": strength, "members": parts}),
    }


def _side_by_side(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """A stacked, B in columns; the scale and the weight of each are multiplied into its B."""
    down = torch.cat([update.down for update in updates])
    ups = (update.up * (update.scale * weight) for update, weight in zip(updates, weights, strict=True))
    return Update(down, torch.cat(list(ups), dim=1), 1.0)


def _rank(updates: Updates) -> int:
    """The highest rank of a layer."""
    return max(len(update.down) for layers in updates.values() for update in layers.values())


def _files(config: AverageConfig) -> list[Path]:
    """The LoRA files, each once. Raises ConfigError."""
    if len(config.loras) < 2:
        raise ConfigError(f"loras has {len(config.loras)} LoRA(s); an average needs two or more: average A B")
    files = [lora_file(text) for text in config.loras]
    hashes = Counter(file_sha256(file) for file in files)
    for file in files:
        if hashes[file_sha256(file)] > 1:
            raise ConfigError(
                f"loras has the LoRA {file} more than once; give it once, and --weights if it is to count more"
            )
    return files


def _names(files: Sequence[Path]) -> list[str]:
    """Each file's name, a run's folder for the file in it; with its number where two are alike."""
    names = [file.resolve().parent.name if file.name == LORA_FILE else file.stem for file in files]
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, 1)]


def _check_same_base(members: Sequence[ImportedLora], names: Sequence[str], base: str | None) -> None:
    """Raises ConfigError for LoRAs of other shapes, of runs on other weights, and without `base` of other names."""
    bases = {member.base.base for member in members}
    if len(bases) > 1:
        raise ConfigError(f"loras are for {len(bases)} bases ({', '.join(sorted(bases))}); give LoRAs of one base")
    for what, found in (("weights", _fingerprints(members)), ("names", _base_names(members))):
        known = {name: value for name, value in zip(names, found, strict=True) if value is not None}
        if len(set(known.values())) < 2 or (what == "names" and base is not None):
            continue
        said = ", ".join(f"{name} on {value}" for name, value in known.items())
        advice = "" if what == "weights" else "; if these are the same weights, give --base"
        raise ConfigError(f"loras were trained on bases of other {what} ({said}); give LoRAs of one base{advice}")


def _fingerprints(members: Sequence[ImportedLora]) -> list[str | None]:
    """The hash of the UNet that each was trained on, of those that lie in a run's folder."""
    return [next(iter(_starts(member.file.path)), None) for member in members]


def _starts(file: Path) -> list[str]:
    folder = file.parent.parent if file.parent.name.startswith("checkpoint-") else file.parent
    run = RunDir(folder)
    if not (run.config_file.is_file() and run.events_file.is_file()):
        return []
    return [event["base"] for event in run.events() if event["event"] == "start" and "base" in event]


def _base_names(members: Sequence[ImportedLora]) -> list[str | None]:
    return [member.file.metadata.get("ss_sd_model_name") for member in members]


def _check_same_layers(members: Sequence[ImportedLora], names: Sequence[str]) -> None:
    """Raises ConfigError where one adapts a layer that another does not."""
    first, *others = [_layers(member.updates) for member in members]
    for layers, name in zip(others, names[1:], strict=True):
        for these, those, lacking in ((first, layers, name), (layers, first, names[0])):
            missing = sorted(these - those)
            if missing:
                raise ConfigError(
                    f"loras adapt other layers: {lacking} lacks {len(missing)}, such as {listed(missing, 1)}; "
                    "give LoRAs that were trained on the same layers"
                )


def _layers(updates: Updates) -> set[str]:
    return {f"{part}.{module}" for part, modules in updates.items() for module in modules}


def _average_embeddings(files: Sequence[Path], names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """The weighted mean of the new tokens' embeddings; nothing where no LoRA has any. Raises ConfigError."""
    beside = [embeddings_beside(file) for file in files]
    if not any(beside):
        return {}
    for name, found in zip(names, beside, strict=True):
        if len(found) != 1:
            raise ConfigError(
                f"loras: {name} has {len(found)} files of new tokens beside it and another LoRA has some; an average "
                "needs one file *_emb.safetensors for each LoRA, or for none"
            )
    tables = [load_file(file) for [file] in beside]
    shapes: list[Mapping[str, tuple[int, ...]]] = [
        {key: tuple(value.shape) for key, value in table.items()} for table in tables
    ]
    for name, own in zip(names, shapes, strict=True):
        if own != shapes[0]:
            raise ConfigError(f"loras: {name} has other new tokens than {names[0]}; give LoRAs of the same tokens")
    return {
        key: sum(weight * table[key].float() for weight, table in zip(weights, tables, strict=True))  # type: ignore[misc]
        for key in tables[0]
    }
