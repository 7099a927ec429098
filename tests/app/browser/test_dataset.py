"""The Dataset tab as a person uses it: captions that nothing overwrites, drops that no bad file spoils."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from app_driver import PATIENCE, AppPage, RunningApp
from PIL import Image
from playwright.sync_api import Locator, Route, expect

from flatlora_diffusion.config import SAMPLES


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


@pytest.mark.long
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
    expect(other.page.get_by_text("the caption has changed meanwhile: a red fox")).to_be_visible(timeout=PATIENCE)
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


def drop_two(page: AppPage, folder: Path) -> None:
    for name in ("fox.png", "owl.png"):
        Image.effect_noise((64, 64), 50).save(folder / name)
    drop(page, folder / "fox.png", folder / "owl.png")
    count(page, "captions 2/2")


def written(app: RunningApp, page: AppPage) -> list[str]:
    """The captions on the app's disk, of the page's session."""
    session = page.page.locator(".fl-photos").get_attribute("data-session")
    folder = app.runs / ".app" / "uploads" / "sessions" / str(session)
    return [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.txt"))]


@pytest.mark.long
def test_a_caption_that_was_typed_and_not_left_outlives_a_reload(
    page: AppPage, app: RunningApp, tmp_path: Path
) -> None:
    drop_two(page, tmp_path)
    field = caption(page, "fox.png")
    field.press("End")
    field.press_sequentially(" in snow")
    count(page, "saved")  # while the field has the focus
    expect(field).to_be_focused()
    assert written(app, page) == ["fox in snow", "owl"]
    field.press_sequentially(" at night")
    page.page.evaluate("stop()")  # of what is on its way
    page.open()
    expect(field).to_have_value("fox in snow at night", timeout=PATIENCE)
    expect(page.page.get_by_text("Saved", exact=True)).to_be_visible(timeout=PATIENCE)
    assert written(app, page) == ["fox in snow at night", "owl"]


@pytest.mark.long
def test_captions_that_the_app_could_not_save_are_saved_when_it_is_back(
    page: AppPage, app: RunningApp, tmp_path: Path
) -> None:
    drop_two(page, tmp_path)
    app.stop()
    fox, owl = caption(page, "fox.png"), caption(page, "owl.png")
    fox.fill("a red fox")
    fox.press("Enter")
    owl.fill("a grey owl")
    owl.blur()
    expect(page.page.get_by_text("Not saved: the app does not answer")).to_have_count(2, timeout=PATIENCE)
    app.start()
    expect(page.page.get_by_text("Saved", exact=True)).to_have_count(2, timeout=PATIENCE)
    assert written(app, page) == ["a red fox", "a grey owl"]
    page.open()
    expect(fox).to_have_value("a red fox", timeout=PATIENCE)
    expect(owl).to_have_value("a grey owl")
    page.forgive()  # of the app that was gone


@pytest.mark.long
def test_a_save_whose_answer_was_lost_is_not_taken_for_another_windows(
    page: AppPage, app: RunningApp, tmp_path: Path
) -> None:
    def lose(route: Route) -> None:
        route.fetch()
        route.abort()

    drop_two(page, tmp_path)
    fox = caption(page, "fox.png")
    unsaved = page.page.get_by_text("Not saved: the app does not answer")
    saved = page.page.get_by_text("Saved", exact=True)
    page.page.route("**/component_server/", lose)
    fox.fill("a  red ")
    expect(unsaved).to_be_visible(timeout=PATIENCE)
    assert written(app, page) == ["a red", "owl"]
    page.page.unroute("**/component_server/")
    fox.fill("a red fox")
    expect(saved).to_be_visible(timeout=PATIENCE)
    page.page.route("**/component_server/", lose)
    fox.fill("a red fox at")
    expect(unsaved).to_be_visible(timeout=PATIENCE)
    fox.fill("a red fox at night")
    page.page.unroute("**/component_server/")
    page.open()
    expect(fox).to_have_value("a red fox at night", timeout=PATIENCE)
    count(page, "captions 2/2")
    expect(page.button("Keep mine")).to_have_count(0)
    expect(saved).to_be_visible(timeout=PATIENCE)
    assert written(app, page) == ["a red fox at night", "owl"]
    page.faults.clear()  # of the calls that were cut off


@pytest.mark.long
def test_a_caption_that_was_not_saved_and_has_changed_meanwhile_is_offered_after_a_reload(
    page: AppPage, app: RunningApp, tmp_path: Path
) -> None:
    drop_two(page, tmp_path)
    page.page.route("**/component_server/", lambda route: route.abort())
    caption(page, "fox.png").fill("a red fox")
    caption(page, "fox.png").blur()
    expect(page.page.get_by_text("Not saved: the app does not answer")).to_be_visible(timeout=PATIENCE)
    page.button("Write all captions from file names").click()
    offered = page.page.get_by_text("the caption has changed meanwhile: a TOK icon of a fox, in the style of TOK")
    expect(offered).to_be_visible(timeout=PATIENCE)
    page.page.unroute("**/component_server/")
    page.open()
    expect(offered).to_be_visible(timeout=PATIENCE)
    expect(caption(page, "fox.png")).to_have_value("a red fox")
    page.button("Take the other").click()
    expect(caption(page, "fox.png")).to_have_value("a TOK icon of a fox, in the style of TOK")
    page.open()
    expect(caption(page, "fox.png")).to_have_value("a TOK icon of a fox, in the style of TOK", timeout=PATIENCE)
    expect(offered).to_have_count(0)
    page.faults.clear()  # of the calls that were cut off


@pytest.mark.long
def test_cards_that_were_typed_in_show_what_is_written_later_and_other_images(page: AppPage, tmp_path: Path) -> None:
    drop_two(page, tmp_path)
    fox, owl = caption(page, "fox.png"), caption(page, "owl.png")
    for field in (fox, owl):
        field.fill("typed")
        field.blur()
    expect(page.page.get_by_text("Saved", exact=True)).to_have_count(2, timeout=PATIENCE)
    page.button("Undo the last change of captions").click()
    expect(owl).to_have_value("owl", timeout=PATIENCE)
    expect(fox).to_have_value("typed")
    page.button("Remove all images").click()
    page.button("Yes, remove all images").click()
    Image.effect_noise((64, 64), 50).save(tmp_path / "cat.png")
    drop(page, tmp_path / "cat.png")
    expect(caption(page, "cat.png")).to_have_value("cat", timeout=PATIENCE)
    caption(page, "cat.png").fill("a cat")
    caption(page, "cat.png").blur()
    count(page, "1 images, captions 1/1, saved")
    page.button("Bring back the images from before").click()
    expect(fox).to_have_value("typed", timeout=PATIENCE)
    expect(owl).to_have_value("owl")


@pytest.mark.long
def test_a_picture_is_enlarged_and_closed_by_mouse_and_keyboard(page: AppPage, tmp_path: Path) -> None:
    Image.effect_noise((900, 600), 50).save(tmp_path / "fox.png")
    drop(page, tmp_path / "fox.png")
    button, dialog = page.button("Enlarge fox.png"), page.page.get_by_role("dialog", name="fox.png")
    button.click()
    expect(dialog).to_contain_text("fox.png: 900 x 600 pixels", timeout=PATIENCE)
    page.page.wait_for_function("document.querySelector('dialog img').naturalWidth === 900")
    assert dialog.locator("img").evaluate("one => one.clientWidth") > 600
    dialog.locator("img").click()
    expect(dialog).to_have_count(0)
    button.press("Enter")
    expect(dialog).to_be_visible()
    page.page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(button).to_be_focused()


@pytest.mark.long
def test_images_that_come_are_told_on_the_train_tab_before_it_is_opened(page: AppPage, tmp_path: Path) -> None:
    page.show_tab("2 Train")
    summary = page.page.locator("#summary")
    expect(summary.locator(".fl-bad")).to_contain_text("no images yet", timeout=PATIENCE)
    page.show_tab("1 Dataset")
    drop_two(page, tmp_path)
    expect(summary).to_contain_text("2 images, captions 2/2", timeout=PATIENCE)
    expect(summary.locator(".fl-bad")).to_have_count(0)
    caption(page, "fox.png").fill("")
    expect(summary).to_contain_text("1 of 2 images have no caption", timeout=PATIENCE)


@pytest.mark.long
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
