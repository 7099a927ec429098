"""Who may ask, and what a browser may do with the answer: the outermost layer of the web server.

A page of somebody else can make a browser ask this app, under its own name (Origin) or under a name that it has bound
to this computer (Host). Both are refused before Gradio sees them; programs send no Origin and are let through.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .login_limit import LoginLimit

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")
_ORIGIN = re.compile(r"https?://([^/@]+)")
_FILE = re.compile(r"/gradio_api/file[=/](.*)", re.DOTALL)
_SAME = ("same-origin", "none")  # of Sec-Fetch-Site: the page itself, and the user's own address line
_INLINE = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/avif", "image/bmp")
_FILE_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
# Gradio's page needs inline scripts and eval; nothing on it needs another machine.
_PAGE_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)


@dataclass(frozen=True)
class Refusal:
    """An answer in place of the app's."""

    status: int
    text: str
    wait_seconds: int = 0


class Guard:
    """Decides which requests are let through. Only files in `served` and not in `private` are given out."""

    def __init__(self, names: Sequence[str], served: Sequence[Path], private: Sequence[Path]) -> None:
        self._names = {name.lower() for name in names}
        self._origins: set[str] = set()
        self._served, self._private = [path.resolve() for path in served], [path.resolve() for path in private]
        self.logins = LoginLimit()

    def admit(self, host: str) -> None:
        """Answer to this name, with or without a port, too, and to a page that was opened under just this."""
        self._origins.add(host.lower())
        self._names.add(_name(host.lower()) or host)

    def refusal(self, scope: Scope) -> Refusal | None:
        """Why the request is not let through; None when it is."""
        headers = Headers(scope=scope)
        hosts = [host.lower() for host in headers.getlist("host")]
        if len(hosts) != 1 or _name(hosts[0]) not in self._names:
            return Refusal(
                403,
                "This app does not answer to the name in the address line; open it under another one, or start it "
                "with --allowed_host NAME.",
            )
        if not self._is_same_origin(hosts[0], headers) or not _is_own_fetch(scope, headers):
            return Refusal(403, "Requests from the pages of others are refused.")
        file = _FILE.search(scope["path"])
        if file is not None and not self._is_served(file[1]):
            return Refusal(403, "This file is not served.")
        wait = self.logins.seconds_to_wait(client_of(scope)) if is_login(scope) else 0
        return Refusal(429, "Too many wrong logins; wait and try again.", wait) if wait else None

    def _is_same_origin(self, host: str, headers: Headers) -> bool:
        for origin in headers.getlist("origin"):
            found = _ORIGIN.fullmatch(origin.lower())
            if found is None or found[1] not in {host, *self._origins}:
                return False
        return True

    def _is_served(self, text: str) -> bool:
        """Whether the file lies in what is served with all links followed; Gradio does not follow them."""
        try:
            path = Path(text).resolve()
        except (OSError, ValueError, RuntimeError):
            return False
        is_private = any(path.is_relative_to(folder) for folder in self._private)
        return not is_private and any(path.is_relative_to(folder) for folder in self._served)


class Doors:
    """The ASGI middleware around the app that asks a Guard, and says to browsers what an answer may be used for."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refusal = self._guard.refusal(scope)
        if refusal is not None:
            await _refuse(refusal, scope, receive, send)
            return
        is_guess, client, logins = is_login(scope), client_of(scope), self._guard.logins
        if is_guess:
            logins.begin(client)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                if is_guess and message["status"] == 200:
                    logins.succeed(client)
                _mark(message, is_file=_FILE.search(scope["path"]) is not None)
            await send(message)

        await self._app(scope, receive, send_marked)


def client_of(scope: Scope) -> str:
    """The address that the request comes from."""
    return str(scope["client"][0]) if scope.get("client") else ""


def is_login(scope: Scope) -> bool:
    """Whether the request tries a password."""
    return scope.get("method") == "POST" and bool(scope["path"].rstrip("/").endswith("/login"))


def host_of(url: str) -> str:
    """`name:port` of a URL."""
    return urlsplit(url).netloc


def _name(host: str) -> str | None:
    """`host` without its port; None for what no browser would send."""
    found = _HOST.fullmatch(host)
    return found[1] if found else None


def _is_own_fetch(scope: Scope, headers: Headers) -> bool:
    """What the page or a program asks for; of another page only a link to the app that the user follows."""
    if headers.get("sec-fetch-site", "none") in _SAME:
        return True
    is_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    return is_link and scope.get("method") in ("GET", "HEAD") and scope["path"] in ("", "/")


def _mark(message: Message, is_file: bool) -> None:
    message.setdefault("headers", [])
    headers = MutableHeaders(scope=message)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["Content-Security-Policy"] = _FILE_POLICY if is_file else _PAGE_POLICY
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if is_file and message["status"] < 300 and kind not in _INLINE:
        named = headers.get("content-disposition", "").partition(";")[2]
        headers["Content-Disposition"] = f"attachment;{named}" if named else "attachment"


async def _refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    headers: dict[str, Any] = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    if refusal.wait_seconds:
        headers["Retry-After"] = str(refusal.wait_seconds)
    await PlainTextResponse(refusal.text, refusal.status, headers)(scope, receive, send)
