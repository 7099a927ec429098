"""The walk through the app in docs/app_walk.webp. Make it anew with `python -m pytest tests/app/browser/walk.py`.

Not collected otherwise: no test. From ten icons to a verdict, as single screenshots at moments of a real training,
each with a line of what happens. FLATLORA_WALK_STEPS=6 makes a short one to try; it goes to FLATLORA_WALK_FILE.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from app_driver import PATIENCE, ROOT, AppPage, RunningApp
from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import expect

from flatlora_diffusion.config import SAMPLES

FILE = Path(os.environ.get("FLATLORA_WALK_FILE", ROOT / "docs" / "app_walk.webp"))
STEPS = int(os.environ.get("FLATLORA_WALK_STEPS", "120"))
ICONS = sorted((SAMPLES / "icons_3d").glob("*.png"))[:10]
VIEW, WIDTH, STRIP = {"width": 960, "height": 600}, 800, 40  # pixels; a frame is WIDTH wide
MAX_BYTES = 5 * 2**20
MOMENTS = (0.25, 0.5, 0.75)  # of each training
NAME = "icons"
ANSWERS = ("1 · Left", "2 · Right")


class Film:
    """Screenshots of a page, each held for a while below a line of text."""

    def __init__(self, page: AppPage) -> None:
        self._page = page.page
        self._frames: list[Image.Image] = []
        self._milliseconds: list[int] = []

    def shoot(self, text: str, seconds: float, top: str = "body") -> None:
        """`top`: what is at the upper edge."""
        self._page.locator(top).filter(visible=True).first.evaluate("element => element.scrollIntoView()")
        self._page.wait_for_function("[...document.images].every(one => one.complete || one.loading === 'lazy')")
        self._page.wait_for_timeout(500)
        shot = Image.open(io.BytesIO(self._page.screenshot(animations="disabled"))).convert("RGB")
        height = round(WIDTH * shot.height / shot.width)
        frame = Image.new("RGB", (WIDTH, height + STRIP), "#1c1917")
        frame.paste(shot.resize((WIDTH, height), Image.Resampling.LANCZOS), (0, STRIP))
        font = ImageFont.load_default(size=19)
        ImageDraw.Draw(frame).text((16, STRIP / 2), text, "white", font, anchor="lm")
        self._frames.append(frame)
        self._milliseconds.append(round(1000 * seconds))

    def save(self, path: Path) -> None:
        first, *rest = self._frames
        first.save(path, save_all=True, append_images=rest, duration=self._milliseconds, loop=0, quality=82, method=6)
        seconds, size = sum(self._milliseconds) / 1000, path.stat().st_size
        print(f"{path}: {len(self._frames)} frames, {seconds:.0f} s, {size / 2**20:.1f} MiB")
        assert size < MAX_BYTES


@pytest.fixture
def app(own_app: RunningApp) -> RunningApp:
    """No other test's runs are in the picture."""
    return own_app


def test_walk(page: AppPage) -> None:
    page.page.set_viewport_size(VIEW)
    film = Film(page)
    give_images(page, film)
    train_both(page, film)
    compare(page, film)
    vote(page, film)
    page.show_tab("Runs")
    expect(page.button("Download for diffusers")).to_be_enabled(timeout=PATIENCE)
    film.shoot("Both runs are kept, with a file for ComfyUI, A1111 and diffusers.", 4)
    film.save(FILE)


def give_images(page: AppPage, film: Film) -> None:
    expect(page.page.get_by_text("Looking for your images")).to_be_hidden(timeout=PATIENCE)
    film.shoot("Teach SDXL the style of ten icons. It all happens on this computer.", 3)
    page.page.locator("#drop input[type=file]").set_input_files(ICONS)
    expect(page.page.locator("#caption-count")).to_contain_text("captions 10/10", timeout=PATIENCE)
    film.shoot("1. Drop the ten icons.", 3, "#caption-count")
    page.fill(Trigger_word="TOK")
    page.button("Write all captions from file names").click()
    last = page.page.get_by_label(f"Caption of {ICONS[-1].name}")
    expect(last).to_have_value(ICONS[-1].with_suffix(".txt").read_text(encoding="utf-8").strip(), timeout=PATIENCE)
    film.shoot("2. A caption for each, from its file name; every one can be edited.", 4, "#caption-count")


def train_both(page: AppPage, film: Film) -> None:
    page.show_tab("2 Train")
    page.fill(Name=NAME, Steps=str(STEPS))
    expect(page.page.locator("#summary")).to_contain_text(f"{STEPS} steps for each of", timeout=PATIENCE)
    film.shoot("3. Train LoRA and Flat-LoRA as a fair pair: same images, same noise.", 4)
    page.button("Start training").click()
    page.wait_for_state(f"{NAME}-lora", "running")
    film.shoot("One after the other, each in a process of its own.", 2, "#live")
    for method, arm in (("LoRA", f"{NAME}-lora"), ("Flat-LoRA", f"{NAME}-flat-lora")):
        for moment in MOMENTS:
            page.wait_for_step(arm, round(STEPS * moment))
            film.shoot(f"{method} trains (shortened); its curve and its samples grow.", 1.5, "#live")
        page.wait_for_state(arm, "finished")
    film.shoot("Both are trained. Samples of each prompt stand beside those from before.", 4, "#samples")


def compare(page: AppPage, film: Film) -> None:
    page.open()  # with what is chosen at first
    page.show_tab("3 Compare")
    expect(page.page.get_by_text(f"{NAME}-flat-lora · Flat-LoRA")).to_be_visible(timeout=PATIENCE)
    film.shoot("4. Compare them on prompts that they have never seen.", 3)
    page.button("Draw").click()
    status = page.page.locator("#fl-compare-status")
    expect(status).to_contain_text("Drawing", timeout=PATIENCE)
    film.shoot("Base, LoRA and Flat-LoRA draw from the same noise.", 2, "#fl-draw")
    expect(page.button("Save as PNG")).to_be_enabled(timeout=PATIENCE)
    film.shoot("The answer first: how far apart the two are.", 4, "#fl-compare-grid")
    page.page.get_by_role("radio", name="LoRA against Flat-LoRA").check()
    page.page.wait_for_timeout(5000)  # until the grid is drawn anew
    film.shoot("And where they differ: black is equal.", 3, "#fl-compare-grid")


def vote(page: AppPage, film: Film) -> None:
    """Every pair, with the first two held longer."""
    page.page.get_by_role("tab", name="Blind vote").click()
    page.button("Start").click()
    counted = page.page.get_by_text("Pair 1 of")
    expect(counted).to_be_visible(timeout=PATIENCE)
    pairs = int(counted.inner_text().split("of")[1].split()[0])
    for pair in range(1, pairs + 1):
        expect(page.page.get_by_text(f"Pair {pair} of {pairs}")).to_be_visible(timeout=PATIENCE)
        if pair <= 3:
            film.shoot(f"5. A blind vote: {pairs} pairs, and no name on them.", 2.5 if pair == 1 else 1.5, "#fl-vote")
        page.button(ANSWERS[pair % 2]).click()
    expect(page.page.get_by_text("you chose the").first).to_be_visible(timeout=PATIENCE)
    film.shoot("The verdict comes when all pairs are done, with how sure it is.", 5, "#fl-vote-count")
