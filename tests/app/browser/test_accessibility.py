"""Every tab for people who see little, use a keyboard, or are made sick by motion: axe-core's rules, focus, motion."""

from __future__ import annotations

from importlib.resources import files

import pytest
from app_driver import PATIENCE, AppPage, RunningApp
from made_up_runs import OF_EXPERIMENT, make_runs
from playwright.sync_api import expect

pytestmark = pytest.mark.long

TABS = ("1 Dataset", "2 Train", "3 Compare", "4 Flatness", "Runs")
# (rule, class of the element): Gradio's own, which no setting of it changes.
OF_GRADIO = {
    ("aria-prohibited-attr", "empty"),  # the box in place of a JSON value that is none
}
FOCUSED = """() => {
  const at = document.activeElement, label = at.closest('label');
  return [at, label].filter(Boolean).map(one => getComputedStyle(one)).some(
    style => style.outlineStyle === 'solid' && parseFloat(style.outlineWidth) >= 2);
}"""


def violations(page: AppPage) -> list[str]:
    """What axe finds on the page once it is drawn in full, which takes a while on busy cores."""
    for _ in range(4):
        page.page.wait_for_timeout(200)
        found = violations_now(page)
        if not found:
            break
    return found


def violations_now(page: AppPage) -> list[str]:
    """One line for each element."""
    found = page.page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [
        f"{rule['id']}: {node['html'][:160]} {node['failureSummary'][:200]}"
        for rule in found
        for node in rule["nodes"]
        if not any(rule["id"] == known and f'class="{name}' in node["html"] for known, name in OF_GRADIO)
    ]


def test_every_tab_is_for_everybody(page: AppPage, app: RunningApp) -> None:
    """In light and dark, on a desk and on a phone; all that moves is at rest, as the system was told to ask for."""
    make_runs(app.runs)
    page.page.emulate_media(reduced_motion="reduce")
    page.load_samples()
    page.page.evaluate((files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for tab in TABS:
        page.show_tab(tab)
        if tab == "2 Train":
            page.page.locator("#more-settings > button").click()
        if tab == "Runs":
            expect(page.button("Download for diffusers")).to_be_visible(timeout=PATIENCE)
            check_samples_and_report(page)
        page.page.wait_for_timeout(1000)  # a chart is drawn after its data has come
        for is_dark in (False, True):
            page.page.evaluate("dark => document.body.classList.toggle('dark', dark)", is_dark)
            for width in (1280, 390):
                page.page.set_viewport_size({"width": width, "height": 900})
                found[f"{tab}, {'dark' if is_dark else 'light'}, {width} px"] = violations(page)
        page.page.evaluate("document.body.classList.remove('dark')")
        page.page.set_viewport_size({"width": 1280, "height": 900})
    assert {where: lines for where, lines in found.items() if lines} == {}
    check_focus_is_seen(page)
    check_red_buttons_are_read_under_the_pointer(page)
    assert (
        page.button("Load the 23 sample icons").evaluate("one => parseFloat(getComputedStyle(one).transitionDuration)")
        <= 1e-4
    )


def check_samples_and_report(page: AppPage) -> None:
    """Both are there, are used by keyboard, and the report's links stay inside of its frame."""
    page.page.locator(f'button[data-run="{OF_EXPERIMENT}"]').click()
    show = page.button("Show the report of exp")
    expect(show).to_be_visible(timeout=PATIENCE)
    show.press("Enter")
    report = page.page.frame_locator("#report iframe")
    expect(report.get_by_role("heading", level=1)).to_be_visible(timeout=PATIENCE)
    report.get_by_role("link", name="Proof", exact=True).press("Enter")
    expect(report.get_by_role("heading", name="Proof", exact=True)).to_be_in_viewport()
    sample = page.page.get_by_role("img", name="a fox, step 4").filter(visible=True).locator("..")
    small = sample.bounding_box()
    sample.press("Enter")
    expect(sample).to_have_attribute("aria-pressed", "true")
    large = sample.bounding_box()
    assert small is not None
    assert large is not None
    assert large["width"] > 1.2 * small["width"]
    before = page.page.get_by_role("img", name="a fox, before training").filter(visible=True)
    expect(before).to_be_in_viewport()
    sample.press("Escape")
    expect(sample).to_have_attribute("aria-pressed", "false")


def check_focus_is_seen(page: AppPage) -> None:
    """On a text, a number, a choice, a tab, a button and a caption."""
    page.show_tab("2 Train")
    places = [page.box("Name"), page.box("Steps"), page.page.get_by_role("radio", name="Flat-LoRA", exact=True)]
    places += [page.page.get_by_role("tab", name="1 Dataset"), page.button("Start training")]
    page.page.keyboard.press("Shift")  # from now on it is a keyboard that moves the focus
    unseen = []
    for place in places:
        place.focus()
        if not page.page.evaluate(FOCUSED):
            unseen.append(place.evaluate("one => one.outerHTML.slice(0, 120)"))
    page.show_tab("1 Dataset")
    page.page.get_by_label("Caption of bread.png").focus()
    assert page.page.evaluate(FOCUSED)
    assert unseen == []


def check_red_buttons_are_read_under_the_pointer(page: AppPage) -> None:
    """Gradio gives them another ground then, and leaves their words in its colour."""
    button = page.button("Remove all images")
    button.hover()
    page.page.wait_for_timeout(300)  # of the transition
    words, ground = button.evaluate("one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]")
    assert words != ground
