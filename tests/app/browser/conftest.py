"""A browser, one app for all tests of this folder, and a page whose console has to stay clean."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from app_driver import PATIENCE, AppPage, RunningApp
from firefox_bidi import FIREFOXES, firefox_path, open_firefox
from playwright.sync_api import Browser, expect

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="package")
def browser(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """Chromium; with FLATLORA_BROWSER=firefox, which `make firefox` sets, an installed Firefox."""
    if os.environ.get("FLATLORA_BROWSER") != "firefox":
        yield request.getfixturevalue("chromium")
        return
    path = firefox_path()
    if path is None:
        pytest.fail(f"FLATLORA_BROWSER=firefox wants a Firefox: none of {', '.join(FIREFOXES)} is on the PATH")
    with open_firefox(path) as firefox:
        yield firefox


@pytest.fixture(scope="package")
def shared_app(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    app = RunningApp(tmp_path_factory.mktemp("app") / "runs")
    try:
        app.start()
        yield app
    finally:
        app.close()


@pytest.fixture
def app(shared_app: RunningApp) -> Iterator[RunningApp]:
    """No training of one test goes on into the next."""
    yield shared_app
    shared_app.kill_trainers()


@pytest.fixture
def own_app(browser: Browser, tmp_path: Path) -> Iterator[RunningApp]:
    """An app for one test alone."""
    app = RunningApp(tmp_path / "runs")
    try:
        app.start()
        yield app
    finally:
        app.close()


@pytest.fixture
def page(browser: Browser, app: RunningApp, tmp_path: Path) -> Iterator[AppPage]:
    """A fresh browser profile with the app open; what its console complains of and the app raises fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = AppPage(context.new_page(), app.url, app)
    try:
        page.open()
        yield page
        assert page.faults == []
        assert "Traceback" not in page.printed(), page.printed()
    finally:
        context.close()
