"""Requests that are answered before a login: the login page and its assets."""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.types import Scope

_OPEN = re.compile(
    r"/|/(login|logout)/?|/(assets|static)/.*|/(theme\.css|manifest\.json|favicon\.ico|robots\.txt)"
    r"|/gradio_api/startup-events",  # by which Gradio sees at its start that it answers
    re.DOTALL,
)


def is_open(path: str) -> bool:
    """Whether the path is answered before a login."""
    return bool(_OPEN.fullmatch(path))


def is_logged_in(scope: Scope) -> bool:
    """Whether the request to a Gradio app comes with a login that the app knows."""
    app, cookies = scope["app"], HTTPConnection(scope).cookies
    token = cookies.get(f"access-token-{app.cookie_id}") or cookies.get(f"access-token-unsecure-{app.cookie_id}")
    return token in app.tokens


def hide_endpoints_until_login() -> None:
    """Gradio writes the names and defaults of all endpoints into its page, into that with the login too."""
    from gradio.routes import templates

    templates.context_processors.append(_endpoints)


def _endpoints(request: Request) -> dict[str, Any]:
    if is_logged_in(request.scope):
        return {}
    return {"gradio_api_info": {"named_endpoints": {}, "unnamed_endpoints": {}}}
