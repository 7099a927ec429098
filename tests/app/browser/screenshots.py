"""The pictures of the app in docs/. Make them anew with `python -m pytest tests/app/browser/screenshots.py`.

Not collected otherwise: no test, it writes docs/app_*.png.
"""

from __future__ import annotations

import re

import pytest
from app_driver import PATIENCE, ROOT, AppPage, RunningApp
from playwright.sync_api import expect

DOCS = ROOT / "docs"
STEPS = 60


@pytest.fixture
def app(own_app: RunningApp) -> RunningApp:
    """No other test's runs are in the picture."""
    return own_app


def shoot(page: AppPage, name: str, top: str = "body") -> None:
    """`top`: what is at the upper edge."""
    page.page.locator(top).first.evaluate("element => element.scrollIntoView()")
    page.page.wait_for_function("[...document.images].every(one => one.complete || one.loading === 'lazy')")
    page.page.wait_for_timeout(2000)  # a chart is drawn after its data has come
    page.page.screenshot(path=DOCS / f"app_{name}.png", animations="disabled")


def test_screenshots(page: AppPage) -> None:
    page.load_samples()
    expect(page.page.get_by_label(re.compile("^Caption of")).nth(22)).to_be_attached(timeout=PATIENCE)
    shoot(page, "dataset")

    page.show_tab("2 Train")
    page.fill(Name="icons", Steps=str(STEPS))
    page.button("Start training").click()
    page.wait_for_step("icons-flat-lora", STEPS // 2)
    shoot(page, "train")
    page.wait_for_state("icons-flat-lora", "finished")

    page.show_tab("3 Compare")
    expect(page.page.get_by_text("icons-flat-lora · Flat-LoRA")).to_be_visible(timeout=PATIENCE)
    page.button("Draw").click()
    expect(page.page.get_by_text("not drawn yet")).to_have_count(0, timeout=PATIENCE)
    expect(page.button("Save as PNG")).to_be_enabled(timeout=PATIENCE)
    shoot(page, "compare", top="#fl-draw")

    page.show_tab("4 Flatness")
    expect(page.page.get_by_text("icons-flat-lora").filter(visible=True).first).to_be_visible(timeout=PATIENCE)
    page.button("Measure").click()
    charts = page.page.locator("#fl-flatness-charts svg")
    expect(charts.first).to_be_visible(timeout=PATIENCE)
    shoot(page, "flatness", top="#fl-measure")

    page.show_tab("Runs")
    expect(page.button("Download for diffusers")).to_be_enabled(timeout=PATIENCE)
    shoot(page, "runs")
