"""Checks of paths to a base, a VAE or a LoRA: a folder, a .safetensors file or a hub id, never a pickle.

Pickled weights can execute code when opened. The checks look at names and folders only and import no torch, so that
a wrong path is reported before torch is imported and before work is queued.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.config import DENOISERS, INCLUDED_BASES, TEXT_PARTS, TINY, ConfigError, ModelConfig
from flatlora_diffusion.storage.run_dir import LORA_FILE

SAFETENSORS = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PARTS = (*DENOISERS, "vae", *TEXT_PARTS)


def available_bases() -> list[str]:
    """Return the names of the included bases whose weights are in this installation."""
    return [name for name, folder in INCLUDED_BASES.items() if (folder / "model_index.json").is_file()]


def is_single_file(value: str) -> bool:
    """Whether `value` names a file, which need not exist."""
    return Path(value).is_file() or value.lower().endswith((SAFETENSORS, *PICKLES))


def check_models(model: ModelConfig, init_lora: str | None = None) -> None:
    """Raise ConfigError for a base, VAE or initial LoRA whose path is invalid."""
    check_base("pretrained_model_name_or_path", model.pretrained_model_name_or_path)
    if model.pretrained_vae_model_name_or_path is not None:
        check_vae("pretrained_vae_model_name_or_path", model.pretrained_vae_model_name_or_path)
    if init_lora is not None:
        check_lora("init_lora", init_lora)


def check_base(setting: str, value: str) -> None:
    """Raise ConfigError unless `value` is an included base, a diffusers folder, a hub id or a .safetensors file."""
    path, what = Path(value), f"{setting}={value!r}"
    if value in INCLUDED_BASES:
        if value not in available_bases():
            raise ConfigError(
                f"{what} has no weights in this installation; use a checkout of the repository, whose samples folder "
                f"has them, or give {TINY} or another base"
            )
    elif is_single_file(value):
        check_weights_file(setting, value)
    elif path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ConfigError(
                f"{what} is a folder without model_index.json; give a folder saved by diffusers, a hub id or a single "
                f"{SAFETENSORS} file"
            )
        _check_folder(what, [path / part for part in _PARTS])
    else:
        _check_hub_id(what, value)


def check_vae(setting: str, value: str) -> None:
    """Raise ConfigError unless `value` is a folder saved by diffusers or a hub id."""
    what = f"{setting}={value!r}"
    if is_single_file(value):
        check_weights_file(setting, value)
        raise ConfigError(f"{what} is a file; give a folder saved by diffusers or a hub id")
    if Path(value).is_dir():
        if not Path(value, "config.json").is_file():
            raise ConfigError(f"{what} is a folder without config.json; give a VAE folder saved by diffusers")
        _check_folder(what, [Path(value)])
    else:
        _check_hub_id(what, value)


def check_lora(setting: str, value: str) -> None:
    """Raise ConfigError unless `value` is a LoRA file or a run folder that has one."""
    if is_single_file(value):
        check_weights_file(setting, value)
    elif not Path(value, LORA_FILE).is_file():
        raise ConfigError(f"{setting}={value!r} is neither a LoRA file nor a folder with {LORA_FILE}")


def check_weights_file(setting: str, value: str) -> None:
    """Raise ConfigError for a file that is missing or not in .safetensors format."""
    what = f"{setting}={value!r}"
    if Path(value).suffix.lower() != SAFETENSORS:
        raise ConfigError(
            f"{what}: only {SAFETENSORS} files are read, because other formats can execute code when opened"
        )
    if not Path(value).is_file():
        raise ConfigError(f"{what} does not exist: there is no such file")


def _check_folder(what: str, folders: Sequence[Path]) -> None:
    """Raise ConfigError for a model with pickled weights only."""
    for folder in folders:
        files = sorted(path for path in folder.glob("*") if path.is_file())
        pickled = [path for path in files if path.suffix.lower() in PICKLES]
        if pickled and not any(path.suffix == SAFETENSORS for path in files):
            raise ConfigError(
                f"{what} has its weights in {pickled[0].name}, which can execute code when opened; only "
                f"{SAFETENSORS} files are read: save it in that format with diffusers"
            )


def _check_hub_id(what: str, value: str) -> None:
    if not _HUB_ID.fullmatch(value):
        raise ConfigError(f"{what} does not exist: there is no such folder, and a hub id has the form OWNER/NAME")
