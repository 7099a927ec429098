"""With --auth nobody is let in without the password."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_driver import PATIENCE, TABS, RunningApp
from patience import HANGS
from playwright.sync_api import Browser, expect

pytestmark = pytest.mark.long


@pytest.fixture
def locked_app(tmp_path: Path) -> Iterator[RunningApp]:
    app = RunningApp(tmp_path / "runs", "--auth", "ann:right", is_program=True)
    try:
        app.start()
        yield app
    finally:
        app.close()


def status(url: str, body: bytes | None = None) -> int:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"})
    try:
        return int(urllib.request.urlopen(request, timeout=HANGS).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_the_right_password_opens_the_app(browser: Browser, locked_app: RunningApp) -> None:
    (locked_app.runs / "secret.txt").write_text("mine")
    file = (locked_app.runs / "secret.txt").resolve().as_posix()
    for path in ("config", "gradio_api/info", f"gradio_api/file={file}"):
        assert status(locked_app.url + path) == 401, path
    for path in ("gradio_api/call/runs", "gradio_api/queue/join"):
        assert status(locked_app.url + path, b'{"data": [null], "fn_index": 0, "session_hash": "a"}') == 401, path
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    try:
        page = context.new_page()
        page.goto(locked_app.url)
        for password in ("wrong", "right"):
            page.get_by_label("username").fill("ann")
            page.get_by_label("password").fill(password)
            page.get_by_role("button", name="Login").click()
            if password == "wrong":
                expect(page.get_by_text("Incorrect")).to_be_visible(timeout=PATIENCE)
                expect(page.get_by_role("tab", name=TABS[0])).to_have_count(0)
        expect(page.get_by_role("tab", name=TABS[0])).to_be_visible(timeout=PATIENCE)
    finally:
        context.close()
