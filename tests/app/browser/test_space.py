"""The Space, made as its README says and started as the platform does: open, draw, vote; nothing trains."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from app_driver import PATIENCE, AppPage, RunningApp, write
from patience import HANGS
from playwright.sync_api import Browser, expect

from app.process.database import Database

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[3]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "requirements.lock")
FOLDERS = ("flatlora_diffusion", "app", "samples")
PROMPT = "a TOK icon of a fox"
COLUMNS = {
    "Base, without a LoRA": None,
    "LoRA, icons-lora": "icons-lora · LoRA",
    "Flat-LoRA, icons-flat-lora": "icons-flat-lora · Flat-LoRA",
    "LoRA, icons-average": "icons-average · LoRA",
}


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Space's folder, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    folder = Path(shutil.copytree(ROOT / "examples" / "space", tmp_path_factory.mktemp("space") / "my-space"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", str(folder), str(source)], check=True)
    return folder


class Embedding(BaseHTTPRequestHandler):
    """A site of another origin, whose page shows in a frame what stands behind its question mark."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(f'<iframe src="{self.path.partition("?")[2]}" width="900" height="600"></iframe>'.encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def other_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Embedding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def app(browser: Browser, space: Path, other_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningApp]:
    for name, value in (("SYSTEM", "spaces"), ("SPACE_ID", "me/mine"), ("SPACE_HOST", "me-mine.hf.space")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", "")
    flags = ("--host", "127.0.0.1", "--framing_site", f"http://localhost:{other_port}")
    app = RunningApp(space / "runs", *flags, script=space / "app.py")
    try:
        app.start()
        yield app
    finally:
        app.close()


def test_visitors_draw_and_vote_and_cannot_train(browser: Browser, app: RunningApp) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(PATIENCE)
    page = AppPage(context.new_page(), app.url, app)
    try:
        page.go_to(app.url)
        expect(page.page.get_by_text("icons-flat-lora · Flat-LoRA")).to_be_visible(timeout=PATIENCE)
        assert page.tab_names() == ["Compare", "Runs"]
        draw(page)
        vote(page)
        page.show_tab("Runs")
        for name in ("icons-lora", "icons-flat-lora", "icons-average"):
            expect(page.page.locator(f'[data-run="{name}"]')).to_contain_text("finished", timeout=PATIENCE)
        for name in ("Delete", "Resume", "Clone settings", "Import", "Save name, tags and note"):
            expect(page.button(name)).to_have_count(0)
        assert page.faults == []
        assert "Traceback" not in page.printed(), page.printed()
    finally:
        context.close()
    refused = httpx.post(f"{app.url}gradio_api/call/start", json={"data": []}, timeout=HANGS)
    assert refused.status_code >= 400
    assert {job.kind for job in Database(app.runs / ".app" / "app.db").jobs()} == {"generate"}


def draw(page: AppPage) -> None:
    page.page.get_by_label("Runs").filter(visible=True).click()
    page.page.get_by_role("option", name=COLUMNS["LoRA, icons-average"]).click()
    page.fill(Prompts=PROMPT, Seeds="0")
    page.page.get_by_role("button", name="More settings").click()
    expect(page.page.get_by_text("Do not wait")).to_have_count(0)
    write(page.page.get_by_label("number input for Steps").filter(visible=True), "2")
    page.button("Draw").click()
    for column in COLUMNS:
        picture = page.page.get_by_role("img", name=f"{column}: {PROMPT} · seed 0", exact=True)
        expect(picture).to_be_visible(timeout=PATIENCE)
        expect(picture).not_to_have_js_property("naturalWidth", 0)


def vote(page: AppPage) -> None:
    page.page.get_by_role("tab", name="Blind vote").click()
    page.button("Start").click()
    expect(page.page.get_by_text("Pair 1 of 1")).to_be_visible(timeout=PATIENCE)
    page.button("1 · Left").click()
    expect(page.page.get_by_text(": you chose the left one")).to_be_visible(timeout=PATIENCE)


def test_a_site_that_was_named_shows_it_in_a_frame_and_no_other_does(
    browser: Browser, app: RunningApp, other_port: int
) -> None:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE)
    try:
        page = context.new_page()
        page.goto(f"http://localhost:{other_port}/?{app.url}")
        tab = page.frame_locator("iframe").get_by_role("tab", name="Compare")
        expect(tab).to_be_visible(timeout=PATIENCE)
        assert app.url in [frame.url for frame in page.frames]
        page.goto(f"http://127.0.0.1:{other_port}/?{app.url}")  # the same site by a name that was not given
        assert app.url not in [frame.url for frame in page.frames]
        expect(tab).to_have_count(0)
    finally:
        context.close()
