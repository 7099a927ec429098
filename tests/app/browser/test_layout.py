"""Where things stand on a wide page, on a desk and on a phone, and in which colours."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from app_driver import PATIENCE, AppPage, RunningApp
from made_up_runs import make_runs
from playwright.sync_api import Browser, expect

from flatlora_diffusion.charts.palette import FLAT_LORA
from flatlora_diffusion.config import METHODS

WIDE, DESK, PHONE = {"width": 1920, "height": 1080}, {"width": 1280, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def app(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """With runs of its own, which the tests only look at."""
    app = RunningApp(tmp_path_factory.mktemp("layout") / "runs")
    app.runs.mkdir()
    make_runs(app.runs)
    try:
        app.start()
        yield app
    finally:
        app.close()


def test_a_chosen_run_is_seen_without_scrolling(page: AppPage) -> None:
    page.show_tab("Runs")
    for size in (DESK, WIDE, PHONE):
        page.page.set_viewport_size(size)
        for run in ("seen-lora", "seen-flat-lora"):
            page.page.locator(f'button[data-run="{run}"]').click()
            expect(page.card(run)).to_be_in_viewport(timeout=PATIENCE)
        if size != PHONE:
            expect(page.button("Download for diffusers")).to_be_in_viewport()
            expect(page.page.locator('button[data-run="seen-lora"]')).to_be_in_viewport()


@pytest.mark.long
def test_a_wide_page_is_used_and_has_the_pictures_beside_the_form(page: AppPage) -> None:
    page.page.set_viewport_size(WIDE)
    for tab in page.tab_names():
        page.show_tab(tab)
        found = page.page.locator(".tabitem").filter(visible=True).first.bounding_box()
        assert found is not None
        assert found["width"] > 0.8 * WIDE["width"], tab
    page.show_tab("3 Compare")
    prompts, grid = (page.box("Prompts").bounding_box(), page.page.locator("#fl-compare-grid").bounding_box())
    assert prompts is not None
    assert grid is not None
    assert grid["x"] > prompts["x"] + prompts["width"]
    expect(page.button("Draw")).to_be_in_viewport()


@pytest.mark.long
def test_charts_have_the_colours_of_light_and_dark_pages(page: AppPage) -> None:
    page.show_tab("Runs")
    page.page.locator('button[data-run="seen-flat-lora"]').click()
    curve = page.page.locator(".fl-chart path").filter(visible=True)
    expect(curve).to_have_count(1, timeout=PATIENCE)
    for is_dark, tone in ((False, FLAT_LORA.tone.light), (True, FLAT_LORA.tone.dark)):
        page.page.evaluate("dark => document.body.classList.toggle('dark', dark)", is_dark)
        colour = "rgb({}, {}, {})".format(*bytes.fromhex(tone[1:]))
        expect(curve).to_have_css("stroke", colour, timeout=PATIENCE)  # of the run that was clicked


def test_three_methods_are_shown_and_the_others_when_they_are_asked_for(page: AppPage) -> None:
    page.show_tab("2 Train")
    shown = page.page.locator("#method").get_by_role("radio").filter(visible=True)
    expect(shown).to_have_count(3, timeout=PATIENCE)
    page.button("More methods").click()
    expect(shown).to_have_count(1 + len(METHODS))
    sam = page.page.get_by_role("radio", name=re.compile("^SAM: "))
    sam.check()
    page.button("Fewer methods").click()
    expect(shown).to_have_count(4)  # the chosen one is not hidden
    expect(sam).to_be_checked()
    page.page.get_by_role("radio", name="LoRA", exact=True).check()
    expect(shown).to_have_count(3)
