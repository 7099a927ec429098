"""Whether the hub can be reached, asked once and shortly: its own libraries go on asking for a minute."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request

from huggingface_hub import constants

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
