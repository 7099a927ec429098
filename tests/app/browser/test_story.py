"""From pictures to a LoRA file and an opinion, as a person goes through it."""

from __future__ import annotations

from pathlib import Path

import pytest
from app_driver import PATIENCE, AppPage, RunningApp, write
from playwright.sync_api import expect
from safetensors.torch import load_file

from flatlora_diffusion.config import SAMPLES

pytestmark = pytest.mark.long

ICONS = sorted((SAMPLES / "icons_3d").glob("*.png"))[:3]
PROMPTS = ("a TOK icon of a fox", "a TOK icon of a key")


def test_upload_caption_train_a_pair_compare_vote_and_download(page: AppPage, tmp_path: Path) -> None:
    upload_and_caption(page)
    page.start_training("story", "both, as a fair pair", 3, preview="a TOK icon of a lighthouse")
    for arm in ("story-lora", "story-flat-lora"):
        page.wait_for_state(arm, "finished")
        assert page.steps_done(arm) == 3
    page.button("Next: compare story-lora and story-flat-lora").click()
    compare(page)
    vote(page)
    check_what_the_browser_keeps(page)
    tensors = load_file(download(page, tmp_path))
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def upload_and_caption(page: AppPage) -> None:
    page.show_tab("1 Dataset")
    page.page.locator("input[type=file]").first.set_input_files(ICONS)
    expect(page.page.get_by_text(f"captions {len(ICONS)}/{len(ICONS)}")).to_be_visible(timeout=PATIENCE)
    page.fill(Trigger_word="TOK")
    page.button("Write all captions from file names").click()
    for icon in ICONS:
        caption = icon.with_suffix(".txt").read_text(encoding="utf-8").strip()
        expect(page.page.get_by_label(f"Caption of {icon.name}")).to_have_value(caption, timeout=PATIENCE)


def compare(page: AppPage) -> None:
    expect(page.page.get_by_text("story-flat-lora · Flat-LoRA")).to_be_visible(timeout=PATIENCE)
    page.fill(Prompts="\n".join(PROMPTS))
    page.page.get_by_role("button", name="More settings").click()
    write(page.page.get_by_label("number input for Steps").filter(visible=True), "2")
    page.button("Draw").click()
    for prompt in PROMPTS:
        for column in ("Base, without a LoRA", "LoRA, story-lora", "Flat-LoRA, story-flat-lora"):
            picture = page.page.get_by_role("img", name=f"{column}: {prompt} · seed 0", exact=True)
            expect(picture).to_be_visible(timeout=PATIENCE)
            expect(picture).not_to_have_js_property("naturalWidth", 0)


def vote(page: AppPage) -> None:
    page.page.get_by_role("tab", name="Blind vote").click()
    start_vote(page)
    expect(page.page.get_by_text("This vote has 2 pairs")).to_be_visible(timeout=PATIENCE)
    for pair, answer in enumerate(("1 · Left", "3 · Tie"), start=1):
        if pair == 2:  # the page opens where it was, and the voter is the same
            page.open()
            page.page.get_by_role("tab", name="Blind vote").click()
            start_vote(page)
        expect(page.page.get_by_text(f"Pair {pair} of 2")).to_be_visible(timeout=PATIENCE)
        for side in ("Left", "Right"):
            shown = page.page.get_by_role("img", name=f"{side} picture").get_attribute("src")
            assert shown is not None
            assert shown.startswith("data:image/png;base64,"), "a file name would tell whose picture it is"
        page.button(answer).click()
    for told in (": you chose the left one", ": a tie"):
        expect(page.page.get_by_text(told)).to_be_visible(timeout=PATIENCE)
    expect(page.page.get_by_text("ties: 1")).to_be_visible()


def start_vote(page: AppPage) -> None:
    for column, arm in (("One column", "LoRA (story-lora)"), ("The other", "Flat-LoRA (story-flat-lora)")):
        expect(page.page.get_by_label(column).filter(visible=True)).to_have_value(arm, timeout=PATIENCE)
    page.button("Start").click()


def check_what_the_browser_keeps(page: AppPage) -> None:
    """The form is as it was left; Gradio keeps nothing of its own."""
    page.show_tab("2 Train")
    assert page.box("Name").input_value() == "story"
    assert page.box("Rank").input_value() == "2"
    expect(page.page.get_by_role("radio", name="both, as a fair pair", exact=True)).to_be_checked()
    kept = page.page.evaluate("({...localStorage})")
    assert all(key.startswith("flatlora-") for key in kept), kept.keys()
    assert sum(map(len, kept.values())) < 20_000
    assert page.page.evaluate("indexedDB.databases()") == []


def download(page: AppPage, folder: Path) -> Path:
    page.show_tab("Runs")
    button = page.button("Download for diffusers")
    expect(button).to_be_enabled(timeout=PATIENCE)
    with page.page.expect_download() as waiting:
        button.click()
    file = folder / waiting.value.suggested_filename
    waiting.value.save_as(file)
    assert file.suffix == ".safetensors"
    return file


def test_all_tabs_fit_a_phone(page: AppPage, app: RunningApp) -> None:
    page.load_samples()
    names = page.tab_names()
    page.page.set_viewport_size({"width": 390, "height": 844})
    page.open()
    widths = {}
    for name in names:
        page.show_tab(name)
        widths[name] = page.settled_width()
        expect(page.page.get_by_role("tab", name=name, exact=True)).to_be_visible()  # and not behind a menu
    assert max(widths.values()) <= 390, widths
