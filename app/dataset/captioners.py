"""The captioning models that are on this computer already, to be offered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from flatlora_diffusion.config import CAPTION_WRITERS
from flatlora_diffusion.evaluation.tagger import MODEL_FILE, TAGS_FILE

from ..process.json_file import read_json


def installed_captioners(folders: Sequence[Path]) -> list[str]:
    """Captioning models in the Hugging Face cache, smallest first, then those in `folders`."""
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
    if (folder / TAGS_FILE).is_file():
        return (folder / MODEL_FILE).is_file()
    architectures = read_json(folder / "config.json").get("architectures")
    is_writer = isinstance(architectures, list) and any(kind in architectures for kind in CAPTION_WRITERS.values())
    return is_writer and any(folder.glob("*.safetensors"))
