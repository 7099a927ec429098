"""The Compare tab's handlers, with pictures from a real `generate` on the tiny random pipeline."""

from __future__ import annotations

import base64
import errno
import html
import io
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch
from patience import wait_until
from PIL import Image

from app.compare import comparison
from app.compare.answer import answer
from app.compare.comparison import default_seeds, read_prompts, read_seeds, read_strengths
from app.compare.export import difference
from app.compare.grid import enlarged
from app.compare.picture_cache import Drawing, DrawOrder, Picture, orders_for
from app.compare.tab import refresh, show_trained
from app.compare.view import BETWEEN, BY_CHECKPOINT, BY_PROMPT, BY_STRENGTH, TO_BASE, CompareView, Form, Shown
from app.compare.vote_view import VoteView
from app.context import make_context
from app.process.database import NewJob
from app.settings import AppSettings
from app.widgets.messages import percent
from app.widgets.theme import COLOURS
from flatlora_diffusion.config import SAMPLES, TINY, TINY_KLEIN, ConfigError
from flatlora_diffusion.storage.run_dir import RunDir

ROOT = Path(__file__).parents[2]
FORM = Form(["icons-lora", "icons-flat-lora"], "a <fox>", "0", BY_PROMPT, 1.0, "", 1, 1.0)
DRAWING = Drawing(("--pretrained_model_name_or_path", "tiny"), 64, 25, 5.0, "no", "abc")


@pytest.fixture
def view(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CompareView]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(pair, tmp_path / "runs")
    view = CompareView(make_context(AppSettings(runs_dir=str(tmp_path / "runs"))))
    yield view
    queue = view.context.queue
    for job in queue.jobs("queued", "running"):
        queue.stop(job.id, immediately=True)
    queue.close()


def test_pictures_are_drawn_once_shown_voted_on_and_saved(view: CompareView, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = view.context.queue
    assert view.start()[1] == ["icons-lora", "icons-flat-lora"]
    assert "3 of 3 pictures are not drawn yet" in view.show(FORM).status
    assert len(view.draw(FORM, "me")) == 1
    assert view.draw(FORM, "me") == []  # it is queued already
    assert view.show(FORM).can_stop

    def is_drawn() -> bool:
        assert queue.tick()
        return not queue.jobs("queued", "running")

    wait_until(is_drawn)
    shown = view.show(FORM)
    assert shown.status == "", shown.status
    assert shown.grid.count("<img") == 3
    assert shown.picture is not None
    assert Image.open(shown.picture).width > 3 * 320
    _check_page(shown)
    with monkeypatch.context() as patched:
        patched.setattr("app.compare.view.save_page", _full)
        unsaved = view.show(FORM)
        assert (unsaved.grid, unsaved.picture) == (shown.grid, None)
        assert "the disk is full" in unsaved.status
    assert view.draw(FORM, "me") == []
    again = CompareView(view.context)  # as after a restart
    assert again.show(FORM).picture == shown.picture
    assert re.match(r'<div class="fl-answer"><p><b>LoRA and Flat-LoRA draw (nearly|similar|clearly)', shown.grid)
    assert "uncertainty" not in shown.grid  # of one picture
    assert f"Drawn by {Path(view.arms()[0].base[1]).name} at 32 x 32 pixels; enlarged" in shown.grid
    for title in ("LoRA", "Flat-LoRA"):
        assert f'border-color:{COLOURS[title]}"><b>{title}</b>' in shown.grid
    compared, between = (view.show(replace(FORM, look=look)) for look in (TO_BASE, BETWEEN))
    assert [one.grid.count("fl-diff") for one in (compared, between)] == [2, 1]
    assert "icons-flat-lora: difference to LoRA" in between.grid
    assert len({one.picture for one in (shown, compared, between)}) == 3
    stronger = view.draw(replace(FORM, strength=1.5), "me")
    assert [list(job.settings)[-2:] for job in stronger] == [["--strengths", "1.5"]]
    _vote_on(view)


def test_the_default_precision_on_a_gpu_is_that_of_the_base(
    view: CompareView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    arms = view.arms()
    for base, precision in ((TINY, "fp16"), (TINY_KLEIN, "bf16")):
        on_base = [replace(arm, base=("--pretrained_model_name_or_path", base)) for arm in arms]
        monkeypatch.setattr(view, "arms", lambda on_base=on_base: on_base)
        assert view.comparison(FORM).precision == precision


def _full(*values: Any) -> Path:
    raise OSError(errno.ENOSPC, "No space left on device")


def _check_page(shown: Shown) -> None:
    """The HTML file shows the same and needs nothing else."""
    assert shown.page is not None
    page = shown.page.read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,') == 3
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script", page)
    for told in ("a &lt;fox&gt; · seed 0", "1 steps, guidance 1, strength 1", "32 pixels, fp32", "Flat-LoRA"):
        assert told in page
    assert "<fox>" not in page
    assert "table-layout: fixed" in page  # all columns are of one width
    assert page.count("<col>") == 3
    packed = re.findall(r"base64,([^\"]+)", page)
    pixels = [Image.open(io.BytesIO(base64.b64decode(one))) for one in packed]
    assert [image.size for image in pixels] == [(32, 32)] * 3
    assert pixels[0].tobytes() != pixels[1].tobytes()


def _vote_on(view: CompareView) -> None:
    votes = VoteView(view)
    ballot = votes.start(FORM, ("base", "icons-flat-lora"), "Which one?", 1, "me")
    page = votes.page(ballot)
    assert page.is_open
    assert "This vote has 1 pairs" in page.count
    assert "No verdict: 0 of 1 pairs" in votes.page(replace(ballot, is_revealed=True)).count
    assert page.question.count("data:image/png") == 2
    assert "lora" not in page.question.lower().split("data:")[0]
    votes.vote(ballot, "tie")
    assert not votes.page(ballot).is_open
    assert "ties: 1" in votes.page(ballot).count
    assert "&lt;i&gt;" in votes.page(replace(ballot, first="<i>")).count
    assert [vote.choice for vote in view.context.runs.database.votes()] == ["tie"]
    with pytest.raises(ConfigError, match="two different columns"):
        votes.start(FORM, ("base", "base"), "Which one?", 1, "me")


def test_the_answer_is_how_much_two_loras_differ_beside_what_they_change(tmp_path: Path) -> None:
    arms = tuple(
        comparison.ComparedRun(name, name, name, tmp_path / name, DRAWING.base, 64) for name in ("lora", "flat-lora")
    )
    rows = {}
    for seed, level in ((0, 20), (1, 24)):
        for place, value in (("", 0), ("a", 100), ("b", 100 + level)):
            Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / f"{seed}{place}.png")
            rows[seed, place] = tmp_path / f"{seed}{place}.png"
    asked = Rows(arms, rows)
    told, rest = answer(asked, asked.drawn)  # type: ignore[arg-type]
    assert told == "LoRA and Flat-LoRA draw nearly the same pictures here."
    assert "by 20% of what they change in the base, with an uncertainty of 21%" in rest
    assert answer(Rows(arms[:1], rows), {})[0] == ""  # type: ignore[arg-type]


def test_a_share_that_rounds_to_nothing_has_no_sign_and_is_not_called_nothing() -> None:
    assert [percent(share, is_signed=True) for share in (0.12, -0.12, 0.0051)] == ["+12%", "-12%", "+1%"]
    assert {percent(share, is_signed=True) for share in (0.005, 0.003, -0.003, -0.005)} == {"under 1%"}
    assert percent(0.0) == "0%"


@dataclass
class Rows:
    """A comparison whose pictures are files of plain grey."""

    arms: tuple[comparison.ComparedRun, ...]
    drawn: dict[tuple[int, str], Path]

    def rows(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(pictures=[(seed, place) for place in ("", "a", "b")]) for seed in (0, 1)]


def test_a_failed_drawing_is_told_with_its_reason(view: CompareView) -> None:
    view.draw(FORM, "me")
    for job in view.context.queue.jobs("queued"):
        view.context.runs.database.change_job(job.id, "queued", state="failed", error="the disk is full", exit_code=1)
    assert "the disk is full. Press Draw to try again" in view.show(FORM).status
    assert len(view.draw(FORM, "me")) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strength": None}, "LoRA strength is empty; enter a number"),
        ({"steps": 252}, "Steps is 252; enter a number from 1 to 100"),
        ({"guidance": -1}, "Guidance is -1; enter a number from 0 to 15"),
    ],
)
def test_a_number_that_cannot_be_is_one_sentence_beside_the_form(
    view: CompareView, change: dict[str, Any], told: str
) -> None:
    wrong = replace(FORM, **change)
    assert told in view.show(wrong).status
    with pytest.raises(ConfigError, match=told):
        view.draw(wrong, "me")


def test_what_is_not_to_wait_goes_first_also_when_it_was_queued_before(view: CompareView) -> None:
    queue = view.context.queue
    other = queue.add_command("generate", ["generate", "--help"], "you")
    (waiting,) = view.draw(FORM, "me")
    assert queue.jobs("queued")[0].id == other.id
    more = replace(FORM, prompts="a <fox>\na hat")
    (new,) = view.draw(more, "me", goes_first=True)
    assert [job.id for job in queue.jobs("queued")] == [waiting.id, new.id, other.id]
    assert view.draw(FORM, "me", goes_first=True) == []


def test_prompts_at_first_have_the_trigger_word_of_the_captions(view: CompareView, tmp_path: Path) -> None:
    (tmp_path / "0001.txt").write_text("a ABC icon of fox, in the style of ABC")
    for config in view.context.runs.folder.glob("*/config.json"):
        saved = json.loads(config.read_text(encoding="utf-8"))
        places = {"pretrained_model_name_or_path": "tiny", "instance_data_dir": str(tmp_path)}
        config.write_text(json.dumps(saved | places), encoding="utf-8")
    prompts = view.start()[2]
    assert "TOK" not in prompts
    assert prompts.splitlines()[0].endswith("in the style of ABC")


def test_what_is_shown_already_is_not_sent_again(view: CompareView) -> None:
    values = list(vars(FORM).values())
    *first, shown = refresh(view, None, *values)
    assert gr.skip() not in first
    assert refresh(view, shown, *values) == (*[gr.skip()] * 5, shown)
    grid, status, *_, stop, _ = refresh(view, replace(shown, status="", can_stop=True), *values)
    assert (grid, status, stop) == (gr.skip(), first[1], gr.update(visible=False))


def test_the_way_on_from_a_training_chooses_what_was_trained_last(view: CompareView) -> None:
    """Not the newest pair, when it was a single run."""
    store, folder = view.context.runs.database, view.context.runs.folder
    shutil.copytree(folder / "icons-lora", folder / "later")
    (job,) = store.add_jobs([NewJob("train", {}, "me", "later")])
    store.change_job(job.id, "queued", state="done")
    tabs, runs = show_trained(view)
    assert tabs.selected == "compare"
    assert runs["value"] == ["later"]
    assert {run_id for _, run_id in runs["choices"]} == {"icons-lora", "icons-flat-lora", "later"}


def test_without_runs_the_page_says_what_to_do(tmp_path: Path) -> None:
    empty = CompareView(make_context(AppSettings(runs_dir=str(tmp_path / "runs"))))
    assert "Train a pair first on the Train tab" in empty.show(FORM).grid
    assert empty.start() == ([], [], "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runs": []}, "no run is chosen"),
        ({"runs": ["gone"]}, "not there any more"),
        ({"prompts": " \n"}, "there is no prompt"),
        ({"prompts": "--output_dir"}, "starts with a dash"),
        ({"strength": None}, "LoRA strength is empty"),
        ({"steps": None}, "Steps is empty"),
        ({"seeds": "one"}, "Seeds = 'one' must be whole numbers"),
        ({"rows": BY_STRENGTH, "strengths": "9"}, "LoRA strengths = '9' must be numbers from 0 to 1.5"),
    ],
)
def test_a_wrong_form_is_told_in_one_sentence(view: CompareView, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        view.draw(replace(FORM, **change), "me")  # type: ignore[arg-type]
    assert message.lower() in html.unescape(view.show(replace(FORM, **change)).status).lower()  # type: ignore[arg-type]
    assert view.context.queue.jobs() == []


def test_an_order_is_read_back_from_its_arguments() -> None:
    order = DrawOrder(DRAWING, ("a fox", "a red hat"), (0, 3), ("runs/a.safetensors",), (0.5, 1.0))
    assert DrawOrder.read(order.arguments(), "abc") == order
    assert DrawOrder.read(["generate", "--help"], "abc") is None


def test_rows_by_checkpoint_draw_the_lora_on_its_way(view: CompareView) -> None:
    form = replace(FORM, rows=BY_CHECKPOINT)
    comparison = view.comparison(form)
    assert [row.label for row in comparison.rows()] == [
        "a <fox> · seed 0 · after 1 steps",
        "a <fox> · seed 0 · at the end",
    ]
    first, last = comparison.rows()
    assert first.pictures[0] == last.pictures[0]  # the base is the same
    assert all(one != other for one, other in zip(first.pictures[1:], last.pictures[1:], strict=True))
    (job,) = view.draw(form, "me")
    loras = [part for part in job.settings if part.endswith(".safetensors")]
    assert sum("checkpoint-1" in lora for lora in loras) == 2
    assert len(loras) == 4
    shutil.rmtree(view.context.runs.folder / "icons-lora" / "checkpoint-1")
    with pytest.raises(ConfigError, match="no checkpoint of the same step was kept on the way"):
        view.comparison(form)


def test_a_run_that_was_trained_longer_stands_below_its_earlier_end(view: CompareView) -> None:
    run = RunDir(view.context.runs.folder / "icons-lora")
    finished = run.ending()
    assert finished is not None
    before = finished["step"]
    form = replace(FORM, runs=["icons-lora"], rows=BY_CHECKPOINT)
    labels = [row.label.rpartition(" · ")[2] for row in view.comparison(form).rows()]
    shutil.copytree(run.folder / "checkpoint-1", run.folder / f"checkpoint-{before}", dirs_exist_ok=True)
    run.config_file.write_text(json.dumps(run.config() | {"max_train_steps": before + 1}), encoding="utf-8")
    (last,) = [one for one in run.events() if one["event"] == "step"][-1:]
    for event in ({"event": "resumed"}, last, {"event": "finished"}):
        run.add_event(event | {"step": before + (event["event"] == "finished")})
    longer = [row.label.rpartition(" · ")[2] for row in view.comparison(form).rows()]
    assert longer == [*labels[:-1], f"after {before} steps", "at the end"]


def test_checkpoints_after_the_one_that_held_out_images_have_chosen_are_no_way_to_it(view: CompareView) -> None:
    run = RunDir(view.context.runs.folder / "icons-lora")
    finished = run.ending()
    assert finished is not None
    for step in (2, 3, finished["step"] + 1):
        shutil.copytree(run.folder / "checkpoint-1", run.folder / f"checkpoint-{step}", dirs_exist_ok=True)
    run.add_event({"event": "finished", "step": 2})
    rows = view.comparison(replace(FORM, runs=["icons-lora"], rows=BY_CHECKPOINT)).rows()
    assert [row.label.rpartition(" · ")[2] for row in rows] == ["after 1 steps", "at the end"]


def test_another_base_in_the_same_place_or_another_precision_is_another_picture(
    view: CompareView, base: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(base, tmp_path / "base"))
    for config in view.context.runs.folder.glob("*/config.json"):
        saved = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(saved | {"pretrained_model_name_or_path": str(own)}), encoding="utf-8")
    before = view.comparison(FORM).pictures()
    assert view.comparison(FORM).pictures() == before
    half = view.comparison(replace(FORM, precision="bf16"))
    assert half.drawing.precision == "bf16"
    assert not set(half.pictures()) & set(before)
    weights = next(own.glob("unet/*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = view.comparison(FORM).pictures()
    assert not set(after) & set(before)
    assert len(view.draw(FORM, "me")) == 1
    (job,) = view.context.queue.jobs()
    assert " --mixed_precision no " in " ".join(job.settings)
    assert set(view.cache.pictures_of(job)) == set(after)


def test_what_is_drawn_first_makes_enough_pairs_for_a_vote() -> None:
    assert default_seeds("a fox") == "0, 1, 2, 3, 4, 5, 6, 7"
    assert default_seeds("a fox\na hat\na cup") == "0, 1, 2"
    assert default_seeds("\n".join(map(str, range(9)))) == "0"


def test_prompts_with_the_same_gaps_share_an_order() -> None:
    files = {"a" * 64: Path("a.safetensors"), "b" * 64: Path("b.safetensors")}
    missing = [Picture(DRAWING, prompt, 0, "a" * 64, 1.0) for prompt in ("one", "two")]
    missing += [Picture(DRAWING, "three", 0, sha, 1.0) for sha in files]
    orders = orders_for(missing, DRAWING, files)
    assert [(order.prompts, order.loras) for order in orders] == [
        (("one", "two"), ("a.safetensors",)),
        (("three",), ("a.safetensors", "b.safetensors")),
    ]


@pytest.mark.parametrize("base", ["tiny", str(SAMPLES / "tiny_sdxl")])
def test_the_tiny_base_is_called_what_it_is(base: str) -> None:
    drawing = replace(DRAWING, base=("--pretrained_model_name_or_path", base))
    assert "the tiny demo base at 64 x 64 pixels" in enlarged(SimpleNamespace(drawing=drawing))  # type: ignore[arg-type]


def test_lists_are_read_as_they_are_written() -> None:
    assert read_prompts(" a fox \n\na fox\na hat") == ("a fox", "a hat")
    assert read_seeds("0, 7 12") == (0, 7, 12)
    assert read_strengths("0.5, 1,1.5") == (0.5, 1.0, 1.5)


def test_the_difference_is_amplified_and_has_no_sign() -> None:
    grey, darker = Image.new("RGB", (2, 2), (100, 100, 100)), Image.new("RGB", (2, 2), (90, 100, 0))
    assert difference(darker, grey).getpixel((0, 0)) == difference(grey, darker).getpixel((0, 0)) == (40, 0, 255)


def test_the_prompts_kept_out_of_training_are_found() -> None:
    assert comparison._HELD_OUT.is_file()
