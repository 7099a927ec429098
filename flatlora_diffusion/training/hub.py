"""Upload a finished run to the Hugging Face hub: its LoRA, its model card and the pictures on the card."""

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

MAX_NAME_LENGTH = 96


def push_to_hub(run: RunDir, config: TrainConfig) -> str:
    """Upload a run that has its model card, and return the address; the run folder is unchanged.

    Raises:
        RunError: the upload failed; the message has the command to repeat it.
    """
    repository, paths = hub_repository(config), hub_files(run)
    if config.run.hub_model_id is None and repository != run.folder.resolve().name:
        logger.info("uploading as %s: %r is not a valid repository name", repository, run.folder.resolve().name)
    api = HfApi(token=config.run.hub_token)
    try:
        address = api.create_repo(repository, exist_ok=True)
        # Not by pattern: the hub's `*.safetensors` also matches files in checkpoint folders.
        operations = [CommitOperationAdd(path, run.folder / path) for path in paths]
        api.create_commit(address.repo_id, operations, commit_message="Upload the LoRA, its card and its pictures")
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise RunError(
            f"the upload to {repository} failed: {_reason(error)}. The LoRA is saved in "
            f"{run.folder}; to upload it later: {_upload_command(repository, run.folder, paths)}"
        ) from error
    return str(address)


def hub_repository(config: TrainConfig) -> str:
    """The repository of the upload, with or without its owner: `hub_model_id`, or a name from that of the run folder.

    Raises ConfigError if `hub_model_id` or `hub_token` is invalid.
    """
    name, token = config.run.hub_model_id, config.run.hub_token
    # The HTTP library's error message would contain the token.
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise ConfigError("hub_token has a blank, a line break or a character beyond ASCII; copy it again")
    if name is None:
        return _allowed_name(Path(config.run.output_dir).resolve().name)
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(
            f"hub_model_id={name!r} is not a repository name; use NAME or OWNER/NAME of letters, digits, '-', '_' "
            f"and '.', at most {MAX_NAME_LENGTH} characters each, with no '--' or '..'"
        ) from error
    return name


def hub_files(run: RunDir) -> list[str]:
    """The files to upload, relative to the run folder: LoRA files with sidecar and preview, card and its pictures.

    Files that the run did not write, such as a base, are left out.
    """
    card = run.folder / REPOCARD_NAME
    widget = ModelCard.load(card).data.get("widget") or []
    pictures = [entry["output"]["url"] for entry in widget]
    weights, name = run.weight_files(), run.lora_name(run.config().get("output_name"))
    sidecars = [f"{name}.json", f"{name}.png"] if f"{name}.safetensors" in weights else []
    return [*weights, *(file for file in sidecars if (run.folder / file).is_file()), card.name, *pictures]


def _allowed_name(name: str) -> str:
    """`name` without accents, with `-` for characters that the hub does not allow in a repository name."""
    letters = [char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char)]
    allowed = re.sub(r"[^A-Za-z0-9_.]+", "-", "".join(letters))
    allowed = re.sub(r"\.{2,}", ".", allowed).strip("-.")[:MAX_NAME_LENGTH].removesuffix(".git").rstrip("-.")
    return allowed or "lora"


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids it"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return "the hub does not know this login; log in with `hf auth login`"
    if status == 403:
        return "this login has no write access (403); use a token with write access and a repository of yours"
    return first_line(error)


def _upload_command(repository: str, folder: Path, paths: list[str]) -> str:
    command = ["hf", "upload", repository, str(folder), "."]
    for path in paths:
        command += ["--include", path]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
