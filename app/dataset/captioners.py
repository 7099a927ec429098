"""The captioning models that are on this computer already, to be offered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from ..runs.processes import read_json

_KIND = "BlipForConditionalGeneration"  # what `load_captioner` reads


def installed_captioners(folders: Sequence[Path]) -> list[str]:
    """BLIP models of the Hugging Face cache by name, the smallest first, then those in `folders` by place."""
    there = [place for folder in folders for place in (folder, *sorted(folder.glob("*/")))]
    return [*_cached(), *(place.as_posix() for place in there if _is_captioner(place))]


def _cached() -> list[str]:
    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except (CacheNotFound, OSError, ValueError):  # ValueError: a file where the folder should be
        return []
    found = [repo for repo in repos if any(_is_captioner(one.snapshot_path) for one in repo.revisions)]
    return [repo.repo_id for repo in sorted(found, key=lambda repo: repo.size_on_disk)]


def _is_captioner(folder: Path) -> bool:
    architectures = read_json(folder / "config.json").get("architectures")
    return isinstance(architectures, list) and _KIND in architectures and any(folder.glob("*.safetensors"))
