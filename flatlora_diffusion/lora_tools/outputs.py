"""Where the verbs may write: what is read stays as it is, and --overwrite replaces only what a verb itself writes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.sdxl.single_file import PREFIXES
from flatlora_diffusion.storage.model_paths import SAFETENSORS
from flatlora_diffusion.storage.separate_folders import relation

_LORA_ENDS = (
    *(".lora_down.weight", ".lora_up.weight", ".alpha"),
    *(".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"),
)
_EMBEDDINGS = ("clip_l", "clip_g")
_SHARD = r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
# The files of a saved SDXL pipeline, by their paths in its folder.
_MODEL_FILES = re.compile(
    r"model_index\.json|scheduler/scheduler_config\.json"
    rf"|(unet|vae)/(config\.json|diffusion_pytorch_model{_SHARD})"
    rf"|text_encoder(_2)?/(config\.json|model{_SHARD})"
    r"|tokenizer(_2)?/((tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json|merges\.txt)"
)


def check_lora_output(path: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """Raises ConfigError for a path that no LoRA file may be written to. `read` are files and folders."""
    _check_file(path, overwrite, read, "LoRA file", lambda name: name.endswith(_LORA_ENDS))


def check_embeddings_output(path: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """As `check_lora_output` for the embeddings of new tokens."""
    _check_file(path, overwrite, read, "file of new tokens' embeddings", lambda name: name in _EMBEDDINGS)


def check_checkpoint_output(path: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """As `check_lora_output` for a whole model in one file."""
    _check_file(path, overwrite, read, "checkpoint of SDXL", lambda name: name.startswith(tuple(PREFIXES.values())))


def check_model_output(folder: Path, overwrite: bool, read: Iterable[Path]) -> None:
    """As `check_lora_output` for a model's folder, which may hold nothing but a model."""
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; give a folder as --output")
    check_kept(folder, read)
    _check_free(folder, overwrite)
    _check_replaceable(folder)


def check_kept(output: Path, read: Iterable[Path]) -> None:
    """Raises ConfigError if writing `output`, a file or a whole folder, would replace what is `read` or a part of it.

    Links are followed, and names in other case are the same where the disk says so.
    """
    for path in read if output.exists() else ():
        found = relation(output, path) if path.exists() else None
        if found is not None:
            what = "is read" if found == "is" else f"{found} {path}, which is read"
            raise ConfigError(f"{output} {what} and stays as it is; give another --output")


def replace_folder(made: Path, output: Path) -> None:
    """Give the complete model folder `made` the name `output`. An earlier model there goes when it is in place.

    Raises ConfigError for a folder that holds anything else by now.
    """
    _check_replaceable(output)
    earlier = made.with_name(f"{made.name}.earlier")
    is_there = output.exists()
    if is_there:
        os.replace(output, earlier)
    try:
        os.replace(made, output)
    except OSError:
        if is_there:
            os.replace(earlier, output)
        raise
    if earlier.is_symlink():
        earlier.unlink()  # where it leads is the user's
    elif is_there:
        shutil.rmtree(earlier)


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """Raises ConfigError for what the system has against writing `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path} cannot be written: {reason}; give another --output") from error


def _check_file(path: Path, overwrite: bool, read: Iterable[Path], what: str, is_ours: Callable[[str], bool]) -> None:
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a .safetensors file as --output")
    if path.suffix != SAFETENSORS:
        raise ConfigError(f"{path} does not end in .safetensors; give a .safetensors file as --output")
    check_kept(path, read)
    _check_free(path, overwrite)
    if path.exists() and not _are(_names(path), is_ours):
        raise ConfigError(f"{path} is no {what}, and --overwrite replaces nothing else; give another --output")


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; give another --output, or --overwrite to replace it")


def _check_replaceable(folder: Path) -> None:
    """Raises ConfigError for a folder that is no model's, or holds more than a model."""
    if not folder.exists():
        return
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"{folder} is a folder that holds no model; --overwrite replaces only models")
    for path in sorted(folder.rglob("*")):
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder and not _MODEL_FILES.fullmatch(path.relative_to(folder).as_posix()):
            raise ConfigError(
                f"{folder} holds {path.relative_to(folder)}, which is no part of a model, and --overwrite replaces "
                "nothing else; give another --output"
            )


def _names(path: Path) -> list[str]:
    """The names of a file's tensors; none for what is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError):
        return []


def _are(names: list[str], is_ours: Callable[[str], bool]) -> bool:
    return bool(names) and all(map(is_ours, names))
