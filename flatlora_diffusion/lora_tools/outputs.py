"""Checks output paths: no verb overwrites its inputs, and --overwrite replaces only files that a verb writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flatlora_diffusion.config import ConfigError, ModelConfig
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.storage.model_paths import SAFETENSORS
from flatlora_diffusion.storage.separate_folders import relation

_LORA_SUFFIXES = (
    *(".lora_down.weight", ".lora_up.weight", ".alpha"),
    *(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
)
_EMBEDDINGS = ("clip_l", "clip_g")
_SHARD = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
# The files of a saved SDXL pipeline, by their paths in its folder.
_PIPELINE_FILES = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json"
    rf"|(unet|transformer|vae)/(config\.json|diffusion_pytorch_model{_SHARD})"
    rf"|text_encoder(_2)?/(config\.json|model{_SHARD})"
    r"|tokenizer(_2)?/((tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt)"
)


def check_lora_output(path: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """Raise ConfigError unless a LoRA file may be written to `path`.

    Args:
        overwrite: Whether an existing LoRA file may be replaced.
        read: The input files and folders.
    """
    _check_file(path, overwrite, read, "LoRA file", lambda name: name.endswith(_LORA_SUFFIXES))


def check_embeddings_output(path: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """Like `check_lora_output`, for the embeddings of new tokens."""
    _check_file(path, overwrite, read, "file of new tokens' embeddings", lambda name: name in _EMBEDDINGS)


def check_checkpoint_output(path: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """Like `check_lora_output`, for a single-file model."""
    prefixes = tuple(family_of(ModelConfig(str(path))).file_prefixes.values())
    _check_file(path, overwrite, read, "checkpoint of SDXL", lambda name: name.startswith(prefixes))


def check_model_output(folder: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """Like `check_lora_output`, for a model folder, which must contain nothing but a model."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder as --output")
    check_not_input(folder, read)
    _check_overwrite(folder, overwrite)
    _check_replaceable(folder)


def check_not_input(output: Path, read: Iterable[Path]) -> None:
    """Raise ConfigError if writing `output`, a file or folder, would replace an input or a part of it.

    Links are followed; on a case-insensitive disk names of different case are equal.
    """
    for path in read if output.exists() else ():
        overlap = relation(output, path) if path.exists() else None
        if overlap is not None:
            reason = "is an input" if overlap == "is" else f"{overlap} {path}, which is an input"
            raise ConfigError(f"{output} {reason} and is not overwritten; give another --output")


def replace_folder(made: Path, output: Path) -> None:
    """Rename the complete model folder `made` to `output`, then delete an earlier model of that name.

    Raises:
        ConfigError: `output` contains anything but a model.
    """
    _check_replaceable(output)
    earlier = made.with_name(f"{made.name}.earlier")
    existed = output.exists()
    if existed:
        os.replace(output, earlier)
    try:
        os.replace(made, output)
    except OSError:
        if existed:
            os.replace(earlier, output)
        raise
    if earlier.is_symlink():
        earlier.unlink()  # the linked folder belongs to the user
    elif existed:
        shutil.rmtree(earlier)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the system's errors in writing `path` into ConfigError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be written: {reason}; give another --output") from error


def _check_file(path: Path, overwrite: bool, read: Iterable[Path], kind: str, is_ours: Callable[[str], bool]) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a .safetensors file as --output")
    if path.suffix != SAFETENSORS:
        raise ConfigError(f"{path} does not end in .safetensors; give a .safetensors file as --output")
    check_not_input(path, read)
    _check_overwrite(path, overwrite)
    if path.exists() and not _all_match(_tensor_names(path), is_ours):
        raise ConfigError(f"{path} is not a {kind}, and --overwrite replaces nothing else; give another --output")


def _check_overwrite(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} already exists; give another --output, or --overwrite to replace it")


def _check_replaceable(folder: Path) -> None:
    """Raise ConfigError for a folder without a model, or with more than a model."""
    if not folder.exists():
        return
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"{folder} is a folder without a model, and --overwrite replaces only models; give another --output"
        )
    for path in sorted(folder.rglob("*")):
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and not _PIPELINE_FILES.fullmatch(path.relative_to(folder).as_posix()):
            raise ConfigError(
                f"{folder} contains {path.relative_to(folder)}, which is no part of a model, and --overwrite replaces "
                "only models; give another --output"
            )


def _tensor_names(path: Path) -> list[str]:
    """The names of a file's tensors; empty if it is not a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def _all_match(names: list[str], is_ours: Callable[[str], bool]) -> bool:
    return bool(names) and all(map(is_ours, names))
