"""What somebody has typed is shown as text wherever it is quoted."""

from __future__ import annotations

import pytest
from app_driver import PATIENCE, AppPage
from playwright.sync_api import expect

HOSTILE = '<img id="injected" src="x">'


@pytest.mark.long
def test_an_error_quotes_what_was_typed_as_text(page: AppPage) -> None:
    page.show_tab("2 Train")
    page.fill(Base_model=HOSTILE)
    page.button("Start training").click()
    toast = page.page.get_by_test_id("toast-body")
    expect(toast).to_contain_text(HOSTILE, timeout=PATIENCE)
    expect(page.page.get_by_text("is outside of the folders").first).to_be_visible(timeout=PATIENCE)
    expect(page.page.locator("#injected")).to_have_count(0)


def test_a_base_is_chosen_from_the_list_or_typed_and_is_there_after_a_reload(page: AppPage) -> None:
    sdxl = "stabilityai/stable-diffusion-xl-base-1.0"
    page.show_tab("2 Train")
    page.box("Base model").click()
    page.page.get_by_role("option", name=sdxl).click()
    for base in (sdxl, "someone/another"):
        if base != sdxl:
            page.fill(Base_model=base)
        kept = "base => (localStorage.getItem('flatlora-train') ?? '').includes(base)"
        page.page.wait_for_function(kept, arg=base, timeout=PATIENCE)
        page.open()
        page.show_tab("2 Train")
        expect(page.box("Base model")).to_have_value(base, timeout=PATIENCE)
    page.forgive()  # of requests that were cut off with the page
