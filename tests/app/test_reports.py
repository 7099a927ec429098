"""The report of an experiment in place: made anew from its figures, in a frame that can do nothing."""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from made_up_comparison import made_up_comparison, with_pictures
from tiny_runs import age

from app.context import AppContext
from app.runs.reports import report_of
from app.runs_tab.report import offer, toggle
from app.runs_tab.run_list import rows_of
from flatlora_diffusion.compare.page.page import write_compare_page

RUN = "demo/lora/seed-0"


def add_run(context: AppContext, run_id: str) -> None:
    folder = context.runs.folder / run_id
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "manifest.json").write_text("[]")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `compare` leaves, with markup where an attacker would have it: in the figures and in the page."""
    folder = tmp_path_factory.mktemp("report")
    result = with_pictures(made_up_comparison(), folder) | {"verdict": "<script>alert(1)</script> it wins"}
    write_compare_page(result, folder)
    (folder / "compare.json").write_text(json.dumps(result))
    (folder / "compare.html").write_text((folder / "compare.html").read_text() + "<p>written by somebody else</p>")
    return folder


@pytest.fixture
def experiment(context: AppContext, report: Path) -> Path:
    """A copy of the report in a folder of runs."""
    for run_id in (RUN, "demo/sigma-0/seed-0", "alone"):
        add_run(context, run_id)
    return Path(shutil.copytree(report, context.runs.folder / "demo", dirs_exist_ok=True))


def frame(context: AppContext, run_id: str, shown: str = "") -> Any:
    return toggle(context, run_id, shown)[1]


def test_the_report_is_opened_in_place_and_closed(context: AppContext, experiment: Path) -> None:
    row, button, file, _, shown = offer(context, RUN, "")
    assert (row.visible, button.value, shown) == (True, "Show the report of demo", "")
    assert Path(file.value["path"] if isinstance(file.value, dict) else file.value).name == "compare.html"
    button, opened, shown = toggle(context, RUN, shown)
    assert (button.value, opened.visible, shown) == ("Hide the report of demo", True, "demo")
    assert "it wins" in opened.value
    assert offer(context, "demo/sigma-0/seed-0", shown)[3:] == (gr.skip(), "demo")  # stays open within the experiment
    row, *_, closed, shown_now = offer(context, "alone", shown)
    assert (row.visible, closed.visible, shown_now) == (False, False, "")
    button, closed, shown = toggle(context, RUN, shown)
    assert (button.value, closed.visible, shown) == ("Show the report of demo", False, "")


def test_the_frame_can_do_nothing_and_holds_no_html_of_the_folder(context: AppContext, experiment: Path) -> None:
    page = frame(context, RUN).value
    assert page.count("<") == 2  # the frame and its end: all else is the text of one attribute
    assert page.startswith('<iframe sandbox="" ')
    inside = html.unescape(page.partition('srcdoc="')[2].rpartition('"')[0])
    assert "<script" not in inside
    assert "&lt;script&gt;alert(1)" in inside
    assert "written by somebody else" not in inside
    assert "default-src &#39;none&#39;" in inside or "default-src 'none'" in inside
    assert 'src="data:image/png;base64,' in inside


def test_the_list_shows_a_picture_of_an_arm_that_drew_no_previews(
    context: AppContext, experiment: Path, tmp_path: Path
) -> None:
    pictures = {row.id: row.picture for row in rows_of(context)}
    assert pictures == {RUN: experiment / "picture-1-0.png", "demo/sigma-0/seed-0": None, "alone": None}
    result = json.loads((experiment / "compare.json").read_text())
    (tmp_path / "secret.png").write_bytes(b"not for everybody")
    result["pictures"]["files"][1][0] = "../../secret.png"
    (experiment / "compare.json").write_text(json.dumps(result))
    assert {row.picture for row in rows_of(context)} == {None}


def test_the_list_shows_the_picture_of_a_report_that_is_written_long_after_the_runs(
    context: AppContext, experiment: Path
) -> None:
    written = (experiment / "compare.json").rename(experiment / "compare.later")
    age(context.runs.folder)
    assert {row.picture for row in rows_of(context)} == {None}
    written.rename(experiment / "compare.json")
    age(experiment)
    assert {row.id: row.picture for row in rows_of(context)}[RUN] == experiment / "picture-1-0.png"


def test_figures_of_another_version_are_told_in_a_sentence(context: AppContext, experiment: Path) -> None:
    for text in ("{}", "[]", "no JSON", '{"verdict": 1, "arms": [1]}'):
        (experiment / "compare.json").write_text(text)
        with pytest.raises(gr.Error, match="another version"):
            frame(context, RUN)


def test_a_report_from_outside_of_the_runs_folder_is_none(
    context: AppContext, experiment: Path, tmp_path: Path
) -> None:
    for name in ("compare.html", "compare.json"):
        (experiment / name).rename(tmp_path / name)
    assert report_of(context.runs, RUN) is None, "above the runs folder"
    for name in ("compare.html", "compare.json"):
        (experiment / name).symlink_to(tmp_path / name)
    assert report_of(context.runs, RUN) is None
    assert offer(context, RUN, "demo")[0].visible is False
    with pytest.raises(gr.Error, match="not there any more"):
        frame(context, RUN)
