"""The page on a disk that is full, a real one of a few megabytes: all is told, and nothing that was typed is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from app_driver import PATIENCE, AppPage, RunningApp
from PIL import Image
from playwright.sync_api import Browser, expect
from small_disk import SmallDisk

pytestmark = pytest.mark.long


@pytest.fixture
def app(
    request: pytest.FixtureRequest, browser: Browser, disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningApp]:
    """An app whose runs are on that disk and, with a parameter, the uploads on their way too."""
    arriving = disk.place if getattr(request, "param", "") else tmp_path
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(arriving / "arriving"))
    app = RunningApp(disk.place / "runs")
    try:
        app.start()
        yield app
    finally:
        app.close()
        disk.empty()


def test_a_full_disk_is_told_wherever_something_cannot_be_kept(
    page: AppPage, disk: SmallDisk, app: RunningApp, tmp_path: Path
) -> None:
    for name in ("fox.png", "owl.png", "cat.png"):
        Image.effect_noise((64, 64), 50).save(tmp_path / name)
    drop = page.page.locator("#drop input[type=file]")
    toast = page.page.get_by_test_id("toast-body")
    drop.set_input_files([tmp_path / "fox.png", tmp_path / "owl.png"])
    fox = page.page.get_by_label("Caption of fox.png")
    expect(fox).to_have_value("fox", timeout=PATIENCE)
    disk.fill()

    def is_user_error() -> None:
        expect(toast.last).to_contain_text("the disk is full", timeout=PATIENCE)
        page.page.get_by_test_id("toast-close").last.click()
        expect(toast).to_have_count(0)

    fox.fill("a red fox")
    fox.blur()
    unsaved = page.page.get_by_text("Not saved: the disk is full")
    expect(unsaved).to_be_visible(timeout=PATIENCE)
    page.button("Write all captions from file names").click()
    is_user_error()
    drop.set_input_files(tmp_path / "cat.png")
    expect(page.page.get_by_text("cat.png: the disk is full")).to_be_visible(timeout=PATIENCE)

    page.show_tab("2 Train")
    expect(page.page.locator("#summary .fl-bad")).to_contain_text("NOT ENOUGH ROOM", timeout=PATIENCE)
    page.button("Start training").click()
    expect(page.button("Do not start")).to_be_focused(timeout=PATIENCE)
    expect(page.page.locator("#queued")).to_contain_text("0 MiB are free on the disk with the runs")
    page.button("Start anyway").click()
    is_user_error()
    page.button("Do not start").click()
    expect(page.button("Start anyway")).to_have_count(0)
    assert list((app.runs / ".app" / "runs").glob("*")) == [], "no name is taken for ever"
    assert list((app.runs / ".app" / "uploads" / "frozen").glob("*")) == []

    page.open()
    page.show_tab("1 Dataset")
    expect(fox).to_have_value("a red fox", timeout=PATIENCE)
    expect(unsaved).to_be_visible(timeout=PATIENCE)
    disk.free()
    expect(page.page.get_by_text("Saved", exact=True)).to_be_visible(timeout=PATIENCE)
    (written,) = app.runs.glob(".app/uploads/sessions/*/0001.txt")
    assert written.read_text() == "a red fox"
    page.open()
    expect(fox).to_have_value("a red fox", timeout=PATIENCE)
    kept = page.page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('flatlora-caption'))")
    assert kept == []


@pytest.mark.parametrize("app", ["on the same disk"], indirect=True)
def test_a_full_disk_is_told_of_an_upload_on_its_way(page: AppPage, disk: SmallDisk, tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "fox.png")
    drop = page.page.locator("#drop input[type=file]")
    disk.fill()
    drop.set_input_files(tmp_path / "fox.png")
    expect(page.page.get_by_test_id("toast-body")).to_contain_text("the disk is full", timeout=PATIENCE)
    disk.free()
    drop.set_input_files(tmp_path / "fox.png")
    expect(page.page.get_by_label("Caption of fox.png")).to_have_value("fox", timeout=PATIENCE)
    assert ["507" in fault for fault in page.faults] == [True]
    page.faults.clear()
