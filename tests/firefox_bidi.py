"""`python firefox_bidi.py FIREFOX ARGUMENTS`: an installed Firefox for Playwright, over WebDriver BiDi.

Playwright asks every browser for a colour scheme by a command that the long-term Firefox does not have yet, and gives
up when it is refused. So a socket stands between the two that puts a harmless command in its place; all else goes
through as it is.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from patience import PATIENCE
from playwright.sync_api import Browser, sync_playwright

FIREFOXES = ("firefox-esr", "firefox")
UNKNOWN, HARMLESS = b'"emulation.setMediaFeaturesOverride"', "session.status"
_ADDRESS = re.compile(rb"(WebDriver BiDi listening on ws://127\.0\.0\.1:)(\d+)")
_TEXT_FRAME = 0x81


def firefox_path() -> str | None:
    """The installed Firefox, None without one."""
    return next(filter(None, map(shutil.which, FIREFOXES)), None)


@contextmanager
def open_firefox(path: str) -> Iterator[Browser]:
    """The Firefox at `path`, without a window."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        starter = Path(folder) / "firefox"
        starter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "{path}" "$@"\n')
        starter.chmod(0o700)
        browser = playwright.firefox.launch(executable_path=starter, channel="moz-firefox", timeout=PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


def main(command: list[str]) -> int:
    """Run Firefox; where it says that it listens, tell of our socket instead. Returns Firefox's exit code."""
    firefox = subprocess.Popen(command, stderr=subprocess.PIPE)
    assert firefox.stderr is not None
    for line in firefox.stderr:
        found = _ADDRESS.search(line)
        shown = line if found is None else b"%s%d\n" % (found[1], relay_to(int(found[2])))
        sys.stderr.buffer.write(shown)
        sys.stderr.buffer.flush()
    return firefox.wait()


def relay_to(port: int) -> int:
    """The port of a socket that hands everything on to the WebSocket server on `port`."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(listener, port), daemon=True).start()
    return int(listener.getsockname()[1])


def _serve(listener: socket.socket, port: int) -> None:
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", port))
        for pump in (_hand_on_commands, _hand_on_answers):
            threading.Thread(target=pump, args=(client, server, port), daemon=True).start()


def _hand_on_answers(client: socket.socket, server: socket.socket, _: int) -> None:
    with suppress(OSError):
        while data := server.recv(2**16):
            client.sendall(data)
    client.close()


def _hand_on_commands(client: socket.socket, server: socket.socket, port: int) -> None:
    stream = client.makefile("rb")
    with suppress(OSError, EOFError):
        for line in iter(stream.readline, b"\r\n"):  # the request that opens the WebSocket; nothing shall be packed
            name = line.lower().partition(b":")[0]
            if name == b"host":
                server.sendall(b"Host: 127.0.0.1:%d\r\n" % port)
            elif name != b"sec-websocket-extensions":
                server.sendall(line)
        server.sendall(b"\r\n")
        while True:
            server.sendall(_known(*_frame(stream)))
    server.close()


def _frame(stream: BinaryIO) -> tuple[bytes, bytes, bytes]:
    """(header, mask, masked text) of the next WebSocket frame (RFC 6455, section 5.2) of a client."""
    header = _read(stream, 2)
    length = header[1] & 0x7F
    if length > 125:
        wide = _read(stream, 2 if length == 126 else 8)
        header, length = header + wide, int.from_bytes(wide, "big")
    return header, _read(stream, 4), _read(stream, length)


def _known(header: bytes, mask: bytes, masked: bytes) -> bytes:
    """The frame, with a command that Firefox knows."""
    text = _masked(masked, mask) if header[0] == _TEXT_FRAME and len(masked) < 1000 else b""
    if UNKNOWN not in text:
        return header + mask + masked
    command = json.dumps({"id": json.loads(text)["id"], "method": HARMLESS, "params": {}}).encode()
    return bytes((_TEXT_FRAME, 0x80 | len(command))) + mask + _masked(command, mask)


def _masked(text: bytes, mask: bytes) -> bytes:
    """The text of what is masked, too."""
    return bytes(byte ^ mask[place % 4] for place, byte in enumerate(text))


def _read(stream: BinaryIO, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
