"""The tabs' handlers as plain functions, and that the page builds."""

from __future__ import annotations

import re

import gradio as gr

from app.context import AppContext
from app.dataset.captioning import caption_all
from app.dataset.tab import load_samples_icons, show
from app.dataset.thumbnails import Thumbnails
from app.forms.forms import ConfigForm
from app.train.tab import BOTH, live, start, summary
from app.ui import build_app


def test_sample_icons_are_shown_captioned_and_queued_as_a_pair(context: AppContext, thumbnails: Thumbnails) -> None:
    session, rejected, *_ = load_samples_icons(context, "")
    caption_all(context, session, "ABC")
    cards, count, *_ = show(context, thumbnails, session, "TOK", "white", False, "tiny", "")
    assert re.findall('data-image="(.*?)"', cards) == [f"{number:04}.png" for number in range(1, 24)]
    assert rejected == ""
    assert ">a ABC icon of a beer mug, in the style of ABC</textarea>" in cards
    assert "captions 23/23" in count
    form = ConfigForm()
    values = form.write({"max_train_steps": 2, "report_to": "none"})
    assert "23 images, captions 23/23" in summary(context, form, session, BOTH, *values)
    start(context, form, session, "two", BOTH, *values)
    assert [job.run for job in context.queue.jobs("queued")] == ["two-lora", "two-flat-lora"]
    assert live(context, None, None)[0].count('data-state="queued"') == 2


def test_the_page_builds(context: AppContext) -> None:
    assert isinstance(build_app(context), gr.Blocks)
