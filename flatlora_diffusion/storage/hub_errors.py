"""Hub access: a quick reachability check, and messages for users when a model cannot be loaded."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from flatlora_diffusion.storage.formatting import first_line

_SECONDS = 5.0  # the hub's own libraries retry for a minute


def hub_is_reachable() -> bool:
    """Whether the hub responds at all; False if HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:  # ValueError: the endpoint is not a URL
        # The libraries may trust other certificate authorities.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def loading_failure(name: str, error: Exception, remedy: str | None = None) -> str:
    """Explain why the folder or hub id `name` could not be loaded, and what to do.

    Args:
        remedy: how to download it; `hf download` by default.
    """
    if Path(name).exists() or not is_missing_files(error):
        return first_line(error)
    if any(isinstance(cause, HFValidationError) for cause in _chain(error)):
        return "there is no such folder, and it cannot be a hub id"
    return (
        f"there is no such folder; as a hub id it is not completely downloaded, and {hub_unreachable()}; give a "
        f"folder, or {remedy or f'run `hf download {name}`'} with a connection to the hub"
    )


def hub_unreachable() -> str:
    """Return the clause that the hub cannot be reached, with the reason if HF_HUB_OFFLINE is set."""
    return "the hub cannot be reached" + (" while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "")


def is_missing_files(error: Exception) -> bool:
    """Whether `error` was caused by files that are neither on disk nor available from the hub."""
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, ConnectionError)
    return any(isinstance(cause, kinds) for cause in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield `error` and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
