"""Whether the hub can be reached, asked once and shortly: its own libraries go on asking for a minute.

And what to say of a model that cannot be had from it: what these libraries advise is for programmers.
"""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

_SECONDS = 5.0


def hub_is_reachable() -> bool:
    """False where no answer comes from the hub, be it an error, or where HF_HUB_OFFLINE forbids to ask."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError) as error:  # ValueError: an endpoint that is no address
        return isinstance(getattr(error, "reason", None), ssl.SSLError)  # the libraries may trust another authority
    return True


def fault_of(name: str, error: Exception, remedy: str | None = None) -> str:
    """Why the folder or hub id `name` could not be loaded, and what to do.

    remedy: what brings it here; None: `hf download`. Of other errors than missing files it is the first line.
    """
    if Path(name).exists() or not lacks_files(error):
        return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if any(isinstance(one, HFValidationError) for one in _chain(error)):
        return "there is no such folder, and it cannot be a hub id"
    return (
        f"there is no such folder; as a hub id it is not downloaded in full, and {unreachable()}; give a folder, or "
        f"{remedy or f'run `hf download {name}`'} where it can be"
    )


def unreachable() -> str:
    """That the hub cannot be reached, and why if that is known."""
    return "the hub cannot be reached" + (" while HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "")


def lacks_files(error: Exception) -> bool:
    """Whether `error` tells of files that are neither on this disk nor to be had."""
    kinds = (LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, ConnectionError)
    return any(isinstance(one, kinds) for one in _chain(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
