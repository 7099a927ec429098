"""The Flatness tab: a real measurement as a queued job, found again, and what is said when it cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import gradio as gr
import pytest
from patience import wait_until

from app.compare.comparison import finished_arms, newest_pair
from app.context import make_context
from app.flatness.answer import answer
from app.flatness.tab import measure, refresh, show
from app.flatness.view import QUICK, FlatnessView
from app.settings import AppSettings
from flatlora_diffusion.config import ConfigError, FlatnessConfig

ROOT = Path(__file__).parents[2]
PAIR = ["icons-lora", "icons-flat-lora"]


@pytest.fixture
def view(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlatnessView]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(pair, tmp_path / "runs")
    view = FlatnessView(make_context(AppSettings(runs_dir=str(tmp_path / "runs"))))
    yield view
    queue = view.context.queue
    for job in queue.jobs("queued", "running"):
        queue.stop(job.id, immediately=True)
    queue.close()


def run_queue(view: FlatnessView) -> list[str]:
    """Run all that is queued; the statuses that were shown meanwhile."""
    queue, shown = view.context.queue, []

    def is_done() -> bool:
        assert queue.tick()
        shown.append(view.status())
        return not queue.jobs("queued", "running")

    wait_until(is_done)
    return shown


def change_config(view: FlatnessView, run_id: str, **values: object) -> None:
    file = view.context.runs.get(run_id).folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def test_runs_of_a_comparison_are_a_pair_to_measure_and_to_compare(view: FlatnessView) -> None:
    folder = view.context.runs.folder
    nested = ["demo/lora/seed-0", "demo/flat-lora/seed-0"]
    for name, run_id in zip(PAIR, nested, strict=True):
        (folder / run_id).parent.mkdir(parents=True)
        (folder / name).rename(folder / run_id)
    assert view.newest() == nested
    assert newest_pair(view.context, finished_arms(view.context)) == nested
    job = view.measure(nested, QUICK, "me")
    assert [str(folder / run_id) for run_id in nested] == list(job.settings)[2:4]


@pytest.mark.long
def test_a_pair_is_measured_shown_and_found_again_after_a_restart(view: FlatnessView) -> None:
    assert set(view.newest()) == set(PAIR)
    assert "Nothing has been measured yet" in view.result(None).charts
    assert "Starting" in measure(view, "me", PAIR, QUICK)
    with pytest.raises(ConfigError, match="runs or waits already"):
        view.measure(PAIR, QUICK, "me")
    shown = run_queue(view)
    assert any("of 3 done" in status for status in shown), shown[-3:]
    assert view.status() == ""
    again = FlatnessView(make_context(view.context.settings))
    ((title, number),) = again.results()
    assert title.startswith("icons-lora and icons-flat-lora, quick")
    result = again.result(number)
    assert result.charts.startswith('<div class="fl-answer"><p><b>')
    assert show(again, number)[0] == result.charts
    for name in ("rise.png", "slices.png", "strength.png", "surface.png"):
        assert f'{name}" download' in result.charts
    drawn = "".join(re.findall(r"<svg.*?</svg>", result.charts, re.DOTALL))
    assert drawn.count("<svg") == 4
    assert {"base", "lora", "flat", "ink", "faint"} <= set(re.findall(r"var\(--([a-z]+)\)", drawn))
    assert set(re.findall("#[0-9a-f]{6}", drawn)) <= {"#ffffff"}, "white on the surface, in light and dark"
    assert "| loss, training images" in result.tables
    assert "icons-flat-lora" in result.tables
    frame = again.surface(number)
    assert 'sandbox="allow-scripts"' in frame
    assert "srcdoc=" in frame  # the server has browsers save an HTML file and never open it
    assert "Plotly" in frame
    assert "<script" not in frame
    choices = refresh(again, None, [], None, "")
    assert (choices[1]["value"], choices[1]["visible"]) == (number, True)
    assert refresh(again, choices[4], PAIR, number, "")[1].keys() == {"__type__"}  # left alone
    file = again.context.queue.output_of(again.context.runs.database.job(number)) / "flatness.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"figures": [{"name": "<script>"}]}))
    assert "another version" in show(again, number)[0]
    file.write_text(json.dumps({"figures": 1}))
    assert "another version" in show(again, number)[0]


@pytest.mark.parametrize(
    ("flat", "told", "rest"),
    [
        (
            (0.8, 0.82, 0.78, 0.8),
            "Flat-LoRA is less sensitive: a small change of its weights disturbs it 20% less than LoRA.",
            "3%.",
        ),
        (
            (1.25, 1.25, 1.24, 1.26),
            "LoRA is less sensitive: a small change of its weights disturbs it 20% less than Flat-LoRA.",
            "1%.",
        ),
        (
            (0.9, 1.1, 1.0, 1.02),
            "Flat-LoRA and LoRA are equally sensitive to small changes",
            "+1%, with an uncertainty",
        ),
        (
            (0.9, 1.1, 0.997, 0.997),
            "Flat-LoRA and LoRA are equally sensitive to small changes",
            "is under 1%, with an uncertainty",
        ),
        (
            (0.9961, 0.9962, 0.9961, 0.996),
            "Flat-LoRA is less sensitive: a small change of its weights disturbs it under 1% less",
            "Uncertainty: under 1%.",
        ),
        (
            (1.002, 1.0021, 1.002, 1.0021),
            "LoRA is less sensitive: a small change of its weights disturbs it under 1% less",
            "Uncertainty: under 1%.",
        ),
    ],
)
def test_the_answer_comes_first_with_how_sure_it_is(flat: tuple[float, ...], told: str, rest: str) -> None:
    figures = [("Base", (2, 2, 2, 2)), ("one", (1.0, 1.0, 1.0, 1.0)), ("two", flat)]
    result = {
        "settings": {"sigmas": [0.05, 0.1]},
        "runs": {"one": {"method": "lora"}, "two": {"method": "flat-lora"}},
        "figures": [{"name": name, "rises": {"filter": [{}, {"values": values}]}} for name, values in figures],
    }
    assert answer(result)[0].startswith(told)
    assert rest in answer(result)[1]
    assert answer(result | {"runs": {"two": {"method": "flat-lora"}}}) == ("", "")


def test_a_loss_that_does_not_rise_tells_nothing() -> None:
    """A mean of few draws can fall below 0, of which no share can be taken."""
    rises = (("Base", (1.0, 1.0)), ("one", (-0.5, 0.3)), ("two", (2.0, 2.0)))
    result = {
        "settings": {"sigmas": [0.1]},
        "runs": {"one": {"method": "lora"}, "two": {"method": "flat-lora"}},
        "figures": [{"name": name, "rises": {"filter": [{"values": values}]}} for name, values in rises],
    }
    told, why = answer(result)
    assert "cannot tell" in told
    assert "%" not in told + why


def test_a_fair_pair_is_chosen_before_a_newer_run(view: FlatnessView) -> None:
    runs = view.context.runs.folder
    shutil.copytree(runs / "icons-flat-lora", runs / "newer")
    for file in (runs / "newer").rglob("*"):
        os.utime(file)
    assert view.runs()[0][1] == "newer"
    assert view.newest() == PAIR


def test_it_waits_its_turn_behind_a_job(view: FlatnessView) -> None:
    view.context.queue.add_command("generate", ["generate", "--help"], "you")
    _, _, _, stop, known, told_of = refresh(view, None, [], None, "")
    assert stop == gr.update(visible=False)
    view.measure(PAIR, QUICK, "me")
    assert "Waiting for another job; one runs at a time." in view.status()
    runs, results, _, stop, known, told_of = refresh(view, known, PAIR, None, told_of)
    assert (runs, results, stop) == (gr.skip(), gr.skip(), gr.update(visible=True))
    assert refresh(view, known, PAIR, None, told_of)[:4] == (gr.skip(),) * 4  # left alone
    view.stop()
    assert view.open_job() is None
    assert view.status() == ""


def test_runs_that_do_not_go_together_are_refused_in_the_words_of_the_command(view: FlatnessView) -> None:
    change_config(view, "icons-lora", pretrained_model_name_or_path="somewhere/else")
    told = measure(view, "me", PAIR, QUICK)
    assert "run icons-flat-lora was trained on another base than icons-lora" in told
    assert 'role="alert"' in told
    assert "no run is chosen" in measure(view, "me", [], QUICK)
    assert view.newest() in (["icons-lora"], ["icons-flat-lora"])
    assert view.context.queue.jobs() == []


@pytest.mark.long
def test_a_failed_measurement_tells_the_sentence_of_the_command(view: FlatnessView) -> None:
    for run_id in PAIR:
        change_config(view, run_id, instance_data_dir="no/such/folder")
    view.measure(PAIR, QUICK, "me")
    run_queue(view)
    assert "image folder no/such/folder does not exist" in view.status()
    assert view.results() == []
    with pytest.raises(ConfigError, match="not there any more"):
        view.result(view.context.queue.jobs()[0].id)


def test_the_quick_setting_is_one_of_the_command(view: FlatnessView) -> None:
    job = view.measure(PAIR, QUICK, "me")
    flags = [part.removeprefix("--") for part in job.settings if part.startswith("--")]
    assert set(flags) - {"no_curvature"} <= {name for name in FlatnessConfig.__dataclass_fields__}
    assert job.about["runs"] == PAIR
