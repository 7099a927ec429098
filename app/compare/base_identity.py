"""A hash of the base that an argument list names; it changes when the files at that path change."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from flatlora_diffusion.families.paths import base_path

_MODELS = ("--pretrained_model_name_or_path", "--pretrained_vae_model_name_or_path")
_REVISION = "--revision"
_READ = ("*.safetensors", "*.json", "*.bin")
_SAMPLE_BYTES = 2**16  # from both ends of each file, as all of SDXL would take minutes


def base_identity(arguments: Sequence[str]) -> str:
    """The hash of the base and VAE that a list of `--flag value` names."""
    digest = hashlib.sha256()
    for flag in _MODELS:
        if flag in arguments:
            name = arguments[arguments.index(flag) + 1]
            revision = arguments[arguments.index(_REVISION) + 1] if _REVISION in arguments else None
            digest.update(f"{flag} {_identity(base_path(name), revision)}\n".encode())
    return digest.hexdigest()[:16]


def _identity(name: str, revision: str | None) -> str:
    """The contents of a folder or file; for a hub id, its commit in the local cache."""
    path = Path(name)
    if path.is_file():
        return _sampled(((str(path), *_state(path)),))
    if path.is_dir():
        files = sorted(file for pattern in _READ for file in path.rglob(pattern))
        return _sampled(tuple((str(file), *_state(file)) for file in files))
    found = try_to_load_from_cache(name, "model_index.json", revision=revision) if name.count("/") == 1 else None
    commit = Path(found).parent.name if isinstance(found, str) else revision
    return f"{name}@{commit}"


def _state(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _sampled(files: tuple[tuple[str, int, int], ...]) -> str:
    """The hash of sizes, beginnings and ends; read again only when a file has changed."""
    digest = hashlib.sha256()
    for name, size, _ in files:
        with open(name, "rb") as file:
            digest.update(f"{size}\n".encode() + file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()
