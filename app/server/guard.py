"""The outermost layer of the web server: which requests are accepted, and the headers of answers.

Another site's page can make a browser send requests to this app, under that site's origin (Origin) or under a host
name that resolves to this computer (Host). Both are rejected before Gradio sees them. Programs send no Origin and are
accepted.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .before_login import is_open
from .login_limit import MAX_WAIT, LoginLimit
from .upload_limit import IncomingUpload, UploadLimit

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")
_ORIGIN = re.compile(r"https?://([^/@]+)")
_FILE = re.compile(r"/gradio_api/file[=/](.*)", re.DOTALL)
_MAX_BODY_BYTES = 32 * 2**20  # bytes of a request that is no upload; Gradio reads it as a whole
_SAME = ("same-origin", "none")  # of Sec-Fetch-Site: the page itself, and the user's own address line
_INLINE = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/avif", "image/bmp")
_FILE_POLICY = "default-src 'none'; frame-ancestors 'none'; sandbox"
# Gradio's page needs inline scripts and eval; nothing on it needs another machine.
_PAGE_POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors "
)


@dataclass(frozen=True)
class Rejection:
    """An answer in place of the app's."""

    status: int
    text: str
    wait_seconds: int = 0


_NO_UPLOADS = Rejection(403, "This app takes no uploads.")
_NO_ROOM = Rejection(413, "Too many uploads are not processed yet; wait a few minutes and try again.")


class Guard:
    """Decides which requests are accepted, and which files are served: those in `served` but not in `private`.

    Args:
        uploads: the limit of received uploads.
        is_logged_in: whether a request has a valid login; None if the app has no login.
        takes_uploads: whether uploads are accepted at all.
    """

    def __init__(
        self,
        names: Sequence[str],
        served: Sequence[Path],
        private: Sequence[Path],
        uploads: UploadLimit,
        is_logged_in: Callable[[Scope], bool] | None = None,
        takes_uploads: bool = True,
    ) -> None:
        self.uploads, self._is_logged_in, self._takes_uploads = uploads, is_logged_in, takes_uploads
        self._framing_sites: list[str] = []
        self._names = {name.lower() for name in names}
        self._origins: set[str] = set()
        self._served, self._private = [path.resolve() for path in served], [path.resolve() for path in private]
        self.logins = LoginLimit()

    def allow_host(self, host: str) -> None:
        """Answer to this name, with or without a port, too, and to a page that was opened under just this."""
        self._origins.add(host.lower())
        self._names.add(_name(host.lower()) or host)

    def allow_framing(self, site: str) -> None:
        """Let the pages of this site show the app in a frame."""
        self._framing_sites.append(site.lower())

    @property
    def page_policy(self) -> str:
        """The Content-Security-Policy of the page."""
        return _PAGE_POLICY + " ".join(["'self'", *self._framing_sites])

    def reject_reason(self, scope: Scope) -> Rejection | None:
        """The rejection of a request; None if it is accepted."""
        headers = Headers(scope=scope)
        hosts = [host.lower() for host in headers.getlist("host")]
        if len(hosts) != 1 or not all(_name(host) in self._names for host in (*hosts, *_other_hosts(headers))):
            return Rejection(
                403,
                "This app does not answer to the name in the address line; open it under another one, or start it "
                "with --allowed_host NAME.",
            )
        opened_as = ("document", "iframe") if self._framing_sites else ("document",)
        if not self._is_same_origin(hosts[0], headers) or not _is_own_fetch(scope, headers, opened_as):
            return Rejection(403, "Requests from other sites are rejected.")
        if self._is_logged_in is not None and not is_open(scope["path"]) and not self._is_logged_in(scope):
            return Rejection(401, "Log in first.")
        file = _FILE.search(scope["path"])
        if file is not None and not self._is_served(file[1]):
            return Rejection(403, "This file is not served.")
        if is_upload(scope) and not self._takes_uploads:
            return _NO_UPLOADS
        if "transfer-encoding" in headers:
            return Rejection(411, "The request has no Content-Length.")
        if not is_upload(scope) and _length(headers) > _MAX_BODY_BYTES:
            return Rejection(413, f"A request other than an upload is limited to {_MAX_BODY_BYTES // 2**20} MiB.")
        return None

    def _is_same_origin(self, host: str, headers: Headers) -> bool:
        for origin in headers.getlist("origin"):
            found = _ORIGIN.fullmatch(origin.lower())
            if found is None or found[1] not in {host, *self._origins}:
                return False
        return True

    def _is_served(self, text: str) -> bool:
        """Whether the file is served once all links are resolved; Gradio does not resolve them."""
        try:
            path = Path(text).resolve()
        except (OSError, ValueError, RuntimeError):
            return False
        is_private = any(path.is_relative_to(folder) for folder in self._private)
        return not is_private and any(path.is_relative_to(folder) for folder in self._served)


class GuardMiddleware:
    """ASGI middleware that applies a Guard and sets security headers."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app, self._guard = app, guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        rejection = self._guard.reject_reason(scope)
        if rejection is None and is_login(scope):
            rejection = await self._wait_for_turn(client_of(scope))
        if rejection is not None:
            await _reject(rejection, scope, receive, send)
            return
        if is_upload(scope):
            await self._take_upload(scope, receive, send)
        else:
            await self._app(scope, receive, self._marked(scope, send))

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._guard.uploads.receive(_length(Headers(scope=scope))) as coming:
            if coming is None:
                await _reject(_NO_ROOM, scope, receive, send)
            else:
                await self._app(scope, _counted(receive, coming), self._marked(scope, send))

    async def _wait_for_turn(self, client: str) -> Rejection | None:
        wait = self._guard.logins.seconds_to_wait(client)
        if wait > MAX_WAIT:
            return Rejection(429, "Too many wrong logins; wait and try again.", math.ceil(wait - MAX_WAIT))
        await asyncio.sleep(wait)
        return None

    def _marked(self, scope: Scope, send: Send) -> Send:
        """`send` with security headers; also reports a correct password to the login limit."""

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                if is_login(scope) and message["status"] == 200:
                    self._guard.logins.succeed(client_of(scope))
                is_file = _FILE.search(scope["path"]) is not None
                _mark(message, is_file, _FILE_POLICY if is_file else self._guard.page_policy)
            await send(message)

        return send_marked


def client_of(scope: Scope) -> str:
    """The address that the request comes from."""
    return str(scope["client"][0]) if scope.get("client") else ""


def is_login(scope: Scope) -> bool:
    """Whether the request tries a password."""
    return scope.get("method") == "POST" and bool(scope["path"].rstrip("/").endswith("/login"))


def is_upload(scope: Scope) -> bool:
    """Whether the request brings files."""
    return scope.get("method") == "POST" and bool(scope["path"].rstrip("/").endswith("/gradio_api/upload"))


def host_of(url: str) -> str:
    """`name:port` of a URL."""
    return urlsplit(url).netloc


def _name(host: str) -> str | None:
    """`host` without its port; None for an invalid host."""
    found = _HOST.fullmatch(host)
    return found[1] if found else None


def _other_hosts(headers: Headers) -> Iterable[str]:
    """Hosts in headers that Gradio prefers to the Host header."""
    for value in headers.getlist("x-forwarded-host"):
        yield from (host.strip().lower() for host in value.split(","))
    yield from (host_of(value.lower()) for value in headers.getlist("x-gradio-server"))


def _length(headers: Headers) -> int:
    """Bytes of the request's body; the web server lets no more in."""
    return int(headers.get("content-length", "0"))


def _counted(receive: Receive, coming: IncomingUpload) -> Receive:
    """`receive` that subtracts received bytes from the upload's remaining size."""

    async def receive_counted() -> Message:
        message = await receive()
        coming.bytes_left -= len(message.get("body", b""))
        return message

    return receive_counted


def _is_own_fetch(scope: Scope, headers: Headers, opened_as: Sequence[str]) -> bool:
    """Whether the page itself or a program sends the request; other sites may only link to the app.

    Args:
        opened_as: what other sites may open the page as, by its name in Sec-Fetch-Dest.
    """
    if headers.get("sec-fetch-site", "none") in _SAME:
        return True
    is_link = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") in opened_as
    return is_link and scope.get("method") in ("GET", "HEAD") and scope["path"] in ("", "/")


def _mark(message: Message, is_file: bool, policy: str) -> None:
    message.setdefault("headers", [])
    headers = MutableHeaders(scope=message)
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Cross-Origin-Resource-Policy"] = "same-origin"
    headers["Content-Security-Policy"] = policy
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if is_file and message["status"] < 300 and kind not in _INLINE:
        named = headers.get("content-disposition", "").partition(";")[2]
        headers["Content-Disposition"] = f"attachment;{named}" if named else "attachment"


async def _reject(rejection: Rejection, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    headers: dict[str, Any] = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
    if rejection.wait_seconds:
        headers["Retry-After"] = str(rejection.wait_seconds)
    await PlainTextResponse(rejection.text, rejection.status, headers)(scope, receive, send)
