"""A finished run on the Hugging Face hub: its LoRA, its card and the pictures on the card, and nothing else."""

from __future__ import annotations

import logging
import os
import re
import shlex
import subprocess
import unicodedata
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from flatlora_diffusion.config import ConfigError, RunError, TrainConfig
from flatlora_diffusion.storage.formatting import first_line
from flatlora_diffusion.storage.run_dir import RunDir

logger = logging.getLogger(__name__)

LONGEST_NAME = 96


def push_to_hub(run: RunDir, config: TrainConfig) -> str:
    """Upload the run, which has its card, and return the repository's address.

    Raises RunError when that fails; it says how to upload later. Nothing in the run folder is changed.
    """
    repository, paths = hub_repository(config), hub_files(run)
    if config.run.hub_model_id is None and repository != run.folder.resolve().name:
        logger.info("uploading as %s: no repository can be called %r", repository, run.folder.resolve().name)
    api = HfApi(token=config.run.hub_token)
    try:
        address = api.create_repo(repository, exist_ok=True)
        # Files one by one: in the hub's patterns `*.safetensors` means those in checkpoint folders as well.
        operations = [CommitOperationAdd(path, run.folder / path) for path in paths]
        api.create_commit(address.repo_id, operations, commit_message="Upload the LoRA, its card and its pictures")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"the upload to {repository} failed: {_reason(error)}. The LoRA is finished and safe in "
            f"{run.folder}; to upload it later: {_upload_command(repository, run.folder, paths)}"
        ) from error
    return str(address)


def hub_repository(config: TrainConfig) -> str:
    """The repository that a run is uploaded to, with or without its owner; the run folder's name is made to fit.

    Raises ConfigError for a `hub_model_id` or `hub_token` that cannot be one: to be asked before training.
    """
    name, token = config.run.hub_model_id, config.run.hub_token
    # The HTTP library's own complaint about such a token would quote it.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("hub_token has a blank, a line break or a letter with an accent in it; copy it again")
    if name is None:
        return _allowed_name(Path(config.run.output_dir).resolve().name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"hub_model_id={name!r} is no name of a repository: use NAME or OWNER/NAME of letters, digits, '-', '_' "
            f"and '.', at most {LONGEST_NAME} characters each, with no '--' or '..'"
        ) from error
    return name


def hub_files(run: RunDir) -> list[str]:
    """What is uploaded, relative to the run folder: LoRA files, what web UIs show with them, card and its pictures.

    Not a file of someone else's that lies there, such as a base.
    """
    card = run.folder / REPOCARD_NAME
    widget = ModelCard.load(card).data.get("widget") or []
    pictures = [entry["output"]["url"] for entry in widget]
    weights, name = run.weight_files(), run.lora_name(run.config().get("output_name"))
    beside = [f"{name}.json", f"{name}.png"] if f"{name}.safetensors" in weights else []
    return [*weights, *(file for file in beside if (run.folder / file).is_file()), card.name, *pictures]


def _allowed_name(name: str) -> str:
    """`name` without accents, and with `-` for whatever the hub does not allow in a repository's name."""
    letters = [char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char)]
    allowed = re.sub(r"[^A-Za-z0-9_.]+", "-", "".join(letters))
    allowed = re.sub(r"\.{2,}", ".", allowed).strip("-.")[:LONGEST_NAME].removesuffix(".git").rstrip("-.")
    return allowed or "lora"


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the hub does not know this login; log in with `hf auth login`"
    if status == 403:
        return "this login may not write there (403); use a token with write access and a repository of yours"
    return first_line(error)


def _upload_command(repository: str, folder: Path, paths: list[str]) -> str:
    command = ["hf", "upload", repository, str(folder), "."]
    for path in paths:
        command += ["--include", path]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
