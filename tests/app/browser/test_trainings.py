"""Trainings outlive the page and the app, stop and go on, and say what went wrong."""

from __future__ import annotations

import pytest
from app_driver import PATIENCE, AppPage, RunningApp
from patience import wait_until
from playwright.sync_api import expect

from flatlora_diffusion.storage.run_dir import RunDir

pytestmark = pytest.mark.long

ENDLESS = 5000


def test_progress_is_shown_again_after_a_reload_and_after_a_restart_of_the_app(page: AppPage, app: RunningApp) -> None:
    page.load_samples()
    page.start_training("long", "LoRA", ENDLESS)
    seen = page.wait_for_step("long", 1)

    page.open()
    page.show_tab("2 Train")
    page.wait_for_state("long", "running")
    seen = page.wait_for_step("long", seen + 1)

    page.go_to("about:blank")  # an open page would complain of the app that is gone
    app.stop()
    app.start()
    page.open()
    page.show_tab("2 Train")
    page.wait_for_state("long", "running")
    page.forgive()  # of requests that were cut off with the page or with the app
    assert page.wait_for_step("long", seen + 1) < ENDLESS


def test_a_stopped_training_resumes_from_its_checkpoint(page: AppPage) -> None:
    page.load_samples()
    page.start_training("halves", "LoRA", 60)
    page.wait_for_step("halves", 1)
    page.button("Stop").press("Enter")
    expect(page.button("Stop it?")).to_be_focused()
    page.wait_for_step("halves", page.steps_done("halves") + 1)  # the card is drawn anew, and still asks
    page.page.keyboard.press("Escape")
    expect(page.button("Stop")).to_be_focused()
    page.page.keyboard.press("Enter")
    page.page.keyboard.press("Enter")
    card = page.wait_for_state("halves", "stopped")
    done = page.steps_done("halves")
    assert done < 60
    expect(card).to_contain_text(f"Resume continues from checkpoint-{done}.")
    page.button("Resume").click()
    page.wait_for_state("halves", "finished")
    assert page.steps_done("halves") == 60


def test_a_killed_training_is_shown_as_failed_with_its_log_and_what_to_do(page: AppPage, app: RunningApp) -> None:
    page.load_samples()
    page.start_training("killed", "LoRA", ENDLESS)
    page.wait_for_step("killed", 1)
    page.button("Save now").click()
    expect(page.page.get_by_text("A checkpoint is saved after this step.")).to_be_visible(timeout=PATIENCE)
    wait_until(RunDir(app.runs / "killed").checkpoints)
    app.kill_trainers()
    card = page.wait_for_state("killed", "failed")
    expect(card).to_contain_text("The training was killed, most often by the system because memory ran out.")
    expect(card).to_contain_text("use a smaller batch or resolution. Resume continues from checkpoint-")
    expect(card.locator("pre")).not_to_be_empty()
    expect(page.button("Resume")).to_be_enabled()
