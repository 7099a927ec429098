"""The Dataset tab as a person uses it: captions that nothing overwrites, drops that no bad file spoils."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from app_driver import PATIENCE, AppPage
from PIL import Image
from playwright.sync_api import Locator, expect

from flatlora_diffusion.config import SAMPLES

pytestmark = pytest.mark.slow


def drop(page: AppPage, *files: Path) -> None:
    page.page.locator("#drop input[type=file]").set_input_files(files)


def caption(page: AppPage, name: str) -> Locator:
    return page.page.get_by_label(f"Caption of {name}", exact=True)


def count(page: AppPage, text: str) -> None:
    expect(page.page.locator("#caption-count")).to_contain_text(text, timeout=PATIENCE)


def test_a_drop_with_a_bad_file_shows_the_good_ones_and_the_next_drop_works(page: AppPage, tmp_path: Path) -> None:
    second = Image.new("RGB", (64, 64), "blue")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "two.jpg", "MPO", save_all=True, append_images=[second])
    (tmp_path / "odd.ppm").write_bytes(b"P6 x 8 255\n")
    drop(page, tmp_path / "two.jpg", tmp_path / "odd.ppm")
    count(page, "1 images")
    expect(page.page.get_by_text("odd.ppm: invalid literal for int")).to_be_visible()
    drop(page, SAMPLES / "icons_3d" / "beer-mug.png")
    count(page, "2 images")
    expect(page.page.get_by_text("odd.ppm")).to_have_count(0)


def test_captions_are_written_on_their_cards_by_keyboard_and_no_window_overwrites_another(
    page: AppPage, tmp_path: Path
) -> None:
    for name in ("fox.png", "owl.png"):
        Image.effect_noise((64, 64), 50).save(tmp_path / name)
    drop(page, tmp_path / "fox.png", tmp_path / "owl.png")
    count(page, "captions 2/2")
    other = AppPage(page.page.context.new_page(), page.url)
    other.open()
    expect(caption(other, "fox.png")).to_have_value("fox", timeout=PATIENCE)
    caption(page, "fox.png").fill("a red fox")
    caption(page, "fox.png").press("Enter")
    expect(caption(page, "owl.png")).to_be_focused()
    count(page, "captions 2/2, saved")
    caption(other, "fox.png").fill("a blue fox")
    caption(other, "fox.png").press("Enter")
    expect(other.page.get_by_text("another window has written: a red fox")).to_be_visible(timeout=PATIENCE)
    other.button("Keep mine").click()
    count(other, "saved")
    other.button("Remove owl.png").press("Enter")
    other.page.get_by_text("Remove it?").press("Enter")
    count(other, "1 images, captions 1/1")
    other.page.close()
    page.open()
    expect(caption(page, "fox.png")).to_have_value("a blue fox", timeout=PATIENCE)
    expect(caption(page, "owl.png")).to_have_count(0)
    page.button("Undo the last change of captions").click()
    expect(caption(page, "fox.png")).to_have_value("a red fox", timeout=PATIENCE)


def test_a_clone_has_the_runs_name_method_and_images_and_takes_new_ones(page: AppPage, tmp_path: Path) -> None:
    for name in ("fox.png", "owl.png"):
        Image.effect_noise((64, 64), 50).save(tmp_path / name)
    drop(page, tmp_path / "fox.png")
    count(page, "1 images")
    page.start_training("source", "LoRA", 2)
    page.wait_for_state("source", "finished")
    page.show_tab("1 Dataset")
    page.button("Remove all images").click()
    page.button("Yes, remove all images").click()
    expect(page.button("Bring back the images from before")).to_be_visible(timeout=PATIENCE)
    page.load_samples()
    page.show_tab("2 Train")
    page.fill(Name="other")
    page.page.get_by_role("radio", name="Flat-LoRA", exact=True).check()

    page.show_tab("Runs")
    expect(page.button("Clone settings")).to_be_enabled(timeout=PATIENCE)
    told = page.page.get_by_text("are in the Dataset tab now in place of 23")
    for _ in range(10):  # a click that comes while the tab is drawn anew is lost, on busy cores
        page.button("Clone settings").click()
        with suppress(AssertionError):
            expect(told).to_be_visible(timeout=PATIENCE // 10)
            break
    expect(told).to_be_visible()
    expect(page.box("Name")).to_have_value("source")
    expect(page.page.get_by_role("radio", name="LoRA", exact=True)).to_be_checked()
    expect(page.page.locator("#summary")).to_contain_text("1 images, captions 1/1", timeout=PATIENCE)
    page.show_tab("1 Dataset")
    expect(caption(page, "fox.png")).to_be_visible(timeout=PATIENCE)
    drop(page, tmp_path / "owl.png")
    count(page, "2 images")
    page.show_tab("2 Train")
    expect(page.page.locator("#summary")).to_contain_text("2 images, captions 2/2", timeout=PATIENCE)
    page.show_tab("1 Dataset")
    page.button("Bring back the images from before").click()
    count(page, "23 images")
