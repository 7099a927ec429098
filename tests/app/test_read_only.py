"""An app with --read_only: open without a login, and nothing in it trains, uploads or changes anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from app_driver import RunningApp, call_endpoint, open_client
from patience import HANGS

from app.compare.view import BY_PROMPT, MAX_LETTERS, MAX_OPEN_STEPS, CompareView, Form
from app.context import make_context
from app.process.database import Database
from app.runs_tab import tab as runs_tab, trash
from app.settings import AppSettings, parse_settings
from app.ui import build_app
from flatlora_diffusion.config import ConfigError

SHIPPED = Path(__file__).parents[2] / "examples" / "space" / "runs"
FORM = Form(["icons-lora", "icons-flat-lora"], "a fox", "0", BY_PROMPT, 1.0, "", 2, 1.0)
CHANGING = (
    *(runs_tab.take_lora, runs_tab.save_labels, runs_tab.delete, runs_tab.undo, runs_tab.clone, runs_tab.resume),
    trash.delete_for_good,
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED, tmp_path / "runs"))


@pytest.fixture
def view(runs: Path) -> CompareView:
    return CompareView(make_context(AppSettings(runs_dir=str(runs), read_only=True)))


def page_of(folder: Path, read_only: bool) -> gr.Blocks:
    return build_app(make_context(AppSettings(runs_dir=str(folder), read_only=read_only)))


def handlers(page: gr.Blocks) -> list[Callable[..., Any]]:
    return [one.fn.func if isinstance(one.fn, partial) else one.fn for one in page.fns.values() if one.fn is not None]


def public(page: gr.Blocks) -> set[str]:
    return {str(one.api_name) for one in page.fns.values() if one.api_visibility == "public"}


def test_it_may_be_open_to_others_without_a_login() -> None:
    settings = parse_settings(["--read_only", "--host", "0.0.0.0"], {})
    assert (settings.read_only, settings.login) == (True, None)
    with pytest.raises(ConfigError, match=r"--read_only"):
        parse_settings(["--host", "0.0.0.0"], {})
    for site in ("huggingface.co", "https://huggingface.co/spaces", "https://a b", "*"):
        with pytest.raises(ConfigError, match="framing_site"):
            parse_settings(["--framing_site", site], {})


def test_its_page_has_no_event_that_trains_takes_images_or_changes_runs(tmp_path: Path) -> None:
    everything = page_of(tmp_path / "all", read_only=False)
    only = page_of(tmp_path / "only", read_only=True)
    assert {"start", "resume", "upload", "caption_by_model"} <= public(everything)
    assert public(only) == {"compare_draw", "runs", "run"}
    assert set(CHANGING) <= set(handlers(everything))
    assert not set(CHANGING) & set(handlers(only))
    modules = {str(one.__module__).split(".")[1] for one in handlers(only) if one.__module__.startswith("app.")}
    assert modules <= {"compare", "runs_tab", "widgets"}


def call(app: RunningApp, name: str) -> httpx.Response:
    return httpx.post(f"{app.url}gradio_api/call/{name}", json={"data": []}, timeout=HANGS)


def test_a_program_can_neither_train_nor_upload(runs: Path, tmp_path: Path) -> None:
    app = RunningApp(runs, "--read_only")
    try:
        app.start()
        uploaded = httpx.post(f"{app.url}gradio_api/upload", files={"files": ("a.png", b"x")}, timeout=HANGS)
        assert uploaded.status_code == 403
        for name in ("start", "resume", "stop", "upload", "load_samples", "caption_by_model"):
            assert call(app, name).status_code >= 400, name
        endpoints = {one["api_name"] for one in httpx.get(f"{app.url}config", timeout=HANGS).json()["dependencies"]}
        assert "runs" in endpoints
        assert not endpoints & {"start", "resume", "stop", "upload"}
        found = call_endpoint(open_client(app.url, tmp_path), "/run", Run="icons-lora")
        assert "icons-lora" in str(found)
        assert Database(runs / ".app" / "app.db").jobs() == []
    finally:
        app.close()


def test_visitors_cannot_make_each_other_wait_for_long(view: CompareView) -> None:
    steps = 100
    many = ", ".join(map(str, range(MAX_OPEN_STEPS // steps // 3)))  # three columns
    with pytest.raises(ConfigError, match=f"{MAX_OPEN_STEPS}"):
        view.draw(Form(**vars(FORM) | {"seeds": f"{many}, 500, 501", "steps": steps}), "me")
    with pytest.raises(ConfigError, match=f"{MAX_LETTERS}"):
        view.draw(Form(**vars(FORM) | {"prompts": "a" * (MAX_LETTERS + 1)}), "me")
    assert view.context.queue.jobs() == []
    assert view.draw(Form(**vars(FORM) | {"seeds": many, "steps": steps}), "me")
    (first,) = view.context.queue.jobs()
    with pytest.raises(ConfigError, match="wait already"):
        view.draw(Form(**vars(FORM) | {"steps": 50}), "you")
    (last,) = view.draw(FORM, "you", goes_first=True)  # few enough, and it waits for its turn
    assert view.context.queue.jobs() == [first, last]


def test_nobody_can_stop_what_others_have_drawn(view: CompareView) -> None:
    view.draw(FORM, "me")
    assert "of 3 pictures" in view.show(FORM).status
    assert not view.show(FORM).can_stop


def test_without_it_the_same_requests_are_taken(runs: Path) -> None:
    """So those of the test above are what a program sends."""
    app = RunningApp(runs)
    try:
        app.start()
        for name in ("start", "resume", "stop", "upload", "load_samples", "caption_by_model"):
            assert call(app, name).status_code == 200, name
    finally:
        app.close()
