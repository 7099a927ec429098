"""The Train tab: what is told before a start, the curves' colours, the log without noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch

from app.context import AppContext
from app.dataset.captioning import empty_captions
from app.dataset.tab import load_samples_icons
from app.forms.forms import ConfigForm, preset_settings
from app.process.launch import Launch
from app.runs.progress import Progress
from app.runs.runs import Run
from app.runs.state import CACHING, ENDING, LOADING, PREVIEWS, SAVING, STOPPING, TRAINING, RunState, phase_of
from app.train.actions import run_action
from app.train.estimates import estimate_disk
from app.train.live_view import actions_for
from app.train.tab import BOTH, PLAIN, apply_preset, live, start, start_with_room, summary
from app.ui import build_app
from app.widgets.loss_chart import loss_curves, run_colours, smooth
from app.widgets.run_cards import run_card, training_lines
from app.widgets.theme import COLOURS
from flatlora_diffusion.config import KLEIN, METHODS, TINY_KLEIN, TrainConfig
from flatlora_diffusion.storage.run_dir import RunDir


def make_run(context: AppContext, name: str, method: str, losses: list[float]) -> None:
    folder = context.runs.folder / name
    folder.mkdir()
    config = TrainConfig.from_dict({"method": method, "max_train_steps": 10, "instance_data_dir": "x"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "manifest.json").write_text("[]")
    events = [
        {"event": "step", "step": step, "loss": loss, "seconds": 1.0, "eta": 0.0} for step, loss in enumerate(losses)
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_curves_have_their_methods_colours_and_are_hidden_without_a_loss(context: AppContext) -> None:
    make_run(context, "one-lora", "lora", [0.3, 0.2])
    make_run(context, "two-lora", "lora", [])
    make_run(context, "one-flat", "flat-lora", [0.3, 0.1])
    runs = {run.id: run for run in context.runs.all()}
    colours = run_colours([runs["one-lora"], runs["one-flat"], runs["two-lora"]])
    assert colours["one-lora"] == COLOURS["LoRA"] == "var(--lora)"
    assert colours["one-flat"] == COLOURS["Flat-LoRA"] == "var(--flat)"
    assert colours["two-lora"] not in (colours["one-lora"], colours["one-flat"])
    shown = loss_curves(context, [runs["one-lora"], runs["one-flat"]])
    assert shown.visible
    assert [shown.value.count(f'<path style="stroke:{colour}" d="M') for colour in ("var(--lora)", "var(--flat)")] == [
        1,
        1,
    ]
    assert "one-flat: 0.1000 after step 2" in shown.value
    context.runs.rename("one-lora", "<b>renamed")  # the chart is of the new name at once
    renamed = loss_curves(context, [context.runs.get("one-lora")]).value
    assert "<title>&lt;b&gt;renamed</title>" in renamed
    assert "stroke:var(--lora)" in renamed
    assert not loss_curves(context, [runs["two-lora"]]).visible


def test_before_the_first_step_a_sentence_stands_for_the_curve(context: AppContext) -> None:
    cards, _, curves, no_loss, previews, log, *_ = live(context, None, None)
    assert "Nothing has been trained here yet" in cards
    assert (curves.visible, no_loss.visible, previews.visible, log.visible) == (False, False, False, False)
    session, _, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    start(context, form, session, "two", BOTH, *form.write({"max_train_steps": 2, "report_to": "none"}))
    _, chosen, curves, no_loss, *rest, seen = live(context, None, None)
    assert (len(chosen.choices), curves.visible, no_loss.visible) == (2, False, True)
    assert rest[-1].visible  # two wait, and can be cancelled together
    assert live(context, None, seen) == (*[gr.skip()] * 8, seen)  # left alone


def test_the_log_is_that_of_the_run_that_trains_until_another_is_chosen_by_hand(
    context: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one-lora", "one-flat-lora"):
        make_run(context, name, name.removeprefix("one-"), [])
    of_run = {"one-lora": "lines of LoRA", "one-flat-lora": "lines of Flat-LoRA"}
    monkeypatch.setattr(context.runs, "log", lambda run_id, lines: [of_run[run_id]])
    states: dict[str, RunState] = {"one-lora": "queued", "one-flat-lora": "queued"}
    monkeypatch.setattr(context.queue, "recent_runs", lambda: list(states))
    get = context.runs.get
    monkeypatch.setattr(context.runs, "get", lambda run_id: replace(get(run_id), state=states[run_id]))
    chosen, seen = None, None

    def shown(**now: RunState) -> str:
        """The run whose log is shown once the states are `now`; the page sends back what it was given."""
        nonlocal chosen, seen
        states.update({name.replace("_", "-"): state for name, state in now.items()})
        _, choice, *_, log, way, _, seen = live(context, chosen, seen)
        chosen = getattr(choice, "value", chosen)
        assert log == gr.skip() or log.value == of_run[str(chosen)]
        is_over = set(states.values()) == {"finished"}
        assert way == gr.skip() or way.visible == is_over
        assert not is_over or way.value == "Next: compare one-lora and one-flat-lora"
        return str(chosen)

    shown()
    assert shown(one_lora="running") == "one-lora"
    assert shown(one_lora="finished", one_flat_lora="running") == "one-flat-lora"
    chosen = "one-lora"  # by hand
    assert (shown(), shown()) == ("one-lora", "one-lora")
    assert shown(one_flat_lora="finished") == "one-lora"
    assert shown(one_lora="queued") == "one-lora"
    chosen = "one-flat-lora"
    assert shown(one_lora="running") == "one-lora"


def test_a_size_that_no_image_of_the_base_has_is_told_before_the_start(context: AppContext) -> None:
    session, _, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    for base, told in ((TINY_KLEIN, "multiple of 8 for this base; 96 is the nearest"), (KLEIN, "at 100 x 100 pixels")):
        values = form.write({"pretrained_model_name_or_path": base, "resolution": 100, "report_to": "none"})
        assert told in summary(context, form, session, PLAIN, *values), "also of a base that is not on this computer"


def test_a_start_asks_where_the_disk_has_no_room_for_both_arms(
    context: AppContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, _, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    values = form.write({"max_train_steps": 2, "report_to": "none"})

    def told(free: int, method: str) -> tuple[bool, bool, list[str | None]]:
        """Whether the summary is red, whether the start asks, and what is queued."""
        monkeypatch.setattr("app.train.estimates.shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
        summed = summary(context, form, session, method, *values)
        _, row = start_with_room(context, form, session, "mine", method, *values)
        return "fl-bad" in summed, bool(row.visible), [job.run for job in context.queue.jobs("queued")]

    one, flat = (
        estimate_disk(form.read(values, method), 23, context.runs.folder).needed for method in ("lora", "flat-lora")
    )
    assert told(one, PLAIN) == (True, True, [])
    assert told(2 * flat, BOTH) == (True, True, [])
    assert told(2 * one, PLAIN) == (False, False, ["mine"])
    assert told(2 * flat + 1, BOTH) == (False, False, ["mine", "mine-lora", "mine-flat-lora"])


def test_the_log_has_the_trainings_own_lines_only() -> None:
    noise = [
        "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. Please install it",
        "Failed to load /x/site-packages/torchao/_C_mxfp8.so: Could not load this library",
        "Warning: Detected no triton, on systems without Triton certain kernels will not work",
        "W1125 11:08:17.496000 9839 /x/site-packages/torch/utils/_pytree.py:630] <enum 'KernelPreference'> is an Enum",
        "Unable to import `torchao` Tensor objects. This may affect loading checkpoints",
        "/x/site-packages/torch/cuda/__init__.py:61: FutureWarning: The pynvml package is deprecated.",
        "  import pynvml  # type: ignore",
    ]
    own = [
        "23 images, captions 23/23, 256 x 256 pixels",
        "lora: 100%|####| 30/30 [00:36<00:00,  1.21s/it, loss=0.0496]",
        "Traceback (most recent call last):",
        '  File "/x/site-packages/torch/nn/modules/module.py", line 1778, in _wrapped_call_impl',
        "    return self._call_impl(*args, **kwargs)",
        "error: rank=0 is out of range",
    ]
    mixed = [line for pair in zip(noise[:5], own[:2] + [""] * 3, strict=True) for line in pair]
    assert training_lines([*mixed, *noise[5:], *own[2:]]) == [*own[:2], "", "", "", *own[2:]]


def test_a_preset_puts_a_wrong_value_right_and_keeps_what_is_the_users(context: AppContext) -> None:
    form = ConfigForm()
    values = dict(zip(form.by_name, form.write({"resolution": 96, "validation_prompt": "a fox"}), strict=True))
    values |= {"rank": 0, "sigma": "much", "resolution": "big"}
    method, *filled = apply_preset(form, "Paper", PLAIN, *values.values())
    applied = dict(zip(form.by_name, filled, strict=True))
    assert method == PLAIN, "it has none of its own but the pair's"
    paper = form.write(preset_settings("Paper", {}))
    assert [applied[name] for name in ("rank", "sigma")] == [
        value for name, value in zip(form.by_name, paper, strict=True) if name in ("rank", "sigma")
    ]
    assert (applied["resolution"], applied["validation_prompt"]) == ("big", "a fox")


def test_a_preset_of_another_method_chooses_it_and_the_next_preset_leaves_the_choice() -> None:
    form = ConfigForm()
    chosen, *filled = apply_preset(form, "Quality", BOTH, *form.write({}))
    assert chosen == METHODS[preset_settings("Quality", {})["method"]].title != METHODS["flat-lora"].title
    for choice in (BOTH, PLAIN, METHODS["sam"].title):
        assert apply_preset(form, "Low memory", choice, *filled)[0] == choice


def test_the_page_applies_a_preset_to_the_method_and_the_form(context: AppContext) -> None:
    page = build_app(context)
    (event,) = [one for one in page.fns.values() if getattr(one.fn, "func", None) is apply_preset]
    preset, *read = event.inputs
    assert read == event.outputs
    assert (preset.label, read[0].label) == ("Preset", "Train")


def test_settings_that_only_the_chosen_method_has_are_trained_with_and_others_left_out(context: AppContext) -> None:
    form = ConfigForm()
    values = form.write({"method": "sam", "rho_rise": 0.05, "max_train_steps": 3, "report_to": "none"})
    session, _, *_ = load_samples_icons(context, "")
    told = summary(context, form, session, METHODS["sam"].title, *values)
    assert "fl-bad" not in told
    start(context, form, session, "by-sam", METHODS["sam"].title, *values)
    start(context, form, session, "pair", BOTH, *values)
    saved = [job.settings for job in context.queue.jobs("queued") if isinstance(job.settings, dict)]
    assert [(one["method"], one["rho_rise"]) for one in saved] == [
        ("sam", 0.05),
        ("lora", None),
        ("flat-lora", None),
    ]


def test_a_second_start_of_the_same_is_told_and_queues_nothing(context: AppContext) -> None:
    session, _, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    values = form.write({"max_train_steps": 2, "report_to": "none"})
    for method, count in ((BOTH, 2), (PLAIN, 3)):
        start(context, form, session, "two", method, *values)
        with pytest.raises(gr.Error, match="with these settings waits or trains already"):
            start(context, form, session, "two", method, *values)
        assert len(context.queue.jobs("queued")) == count
    start(context, form, session, "two", PLAIN, *form.write({"max_train_steps": 3, "report_to": "none"}))
    start(context, form, session, "three", PLAIN, *values)
    assert len(context.queue.jobs("queued")) == 5


def test_images_without_a_caption_are_told_before_the_start(context: AppContext) -> None:
    session, _, *_ = load_samples_icons(context, "")
    empty_captions(context, session)
    form = ConfigForm()
    values = form.write({"max_train_steps": 46, "report_to": "none"})
    assert "23 of 23 images have no caption; write them in the Dataset tab" in summary(
        context, form, session, PLAIN, *values
    )
    with pytest.raises(gr.Error, match="23 of 23 images have no caption"):
        start(context, form, session, "one", PLAIN, *values)
    prompted = form.write({"max_train_steps": 46, "report_to": "none", "instance_prompt": "a TOK icon"})
    told = summary(context, form, session, PLAIN, *prompted)
    assert "23 images, captions 0/23, at 64 x 64 pixels" in told
    assert "46 steps; each image is seen about 8 times" in told


def test_what_waits_is_moved_up_and_cancelled_from_its_card(context: AppContext) -> None:
    session, _, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    start(context, form, session, "two", BOTH, *form.write({"max_train_steps": 2, "report_to": "none"}))
    other = context.queue.add_command("flatness", ["flatness", "--help"], session)
    cards = live(context, None, None)[0]
    assert cards.count('data-act="cancel"') == 3
    assert cards.count('data-act="earlier"') == 2
    assert "Measuring flatness, waiting" in cards
    run_action(context, session, "earlier", f"job {other.id}")
    assert [job.run for job in context.queue.jobs("queued")] == ["two-lora", None, "two-flat-lora"]
    run_action(context, session, "earlier", f"job {other.id}")
    assert [job.run for job in context.queue.jobs("queued")] == [None, "two-lora", "two-flat-lora"]
    run_action(context, session, "cancel", "two-lora")
    assert [job.run for job in context.queue.jobs("queued")] == [None, "two-flat-lora"]
    with pytest.raises(gr.Error, match="does not wait any more"):
        run_action(context, session, "earlier", "two-lora")
    assert context.queue.cancel_waiting() == 2
    assert context.queue.jobs("queued") == []


def test_a_running_training_says_what_it_is_busy_with(tmp_path: Path) -> None:
    run, launch = RunDir(tmp_path / "run"), Launch(tmp_path / "launch")
    for folder in (run.folder, launch.folder):
        folder.mkdir()

    def phase(has_previews: bool = True, **progress: Any) -> str:
        return phase_of(run, launch, Progress(total=4, **progress), has_previews)

    assert phase() == LOADING
    launch.log_file.write_text("23 images\nthe base is SDXL: epsilon (by its scheduler)\n")
    assert phase() == CACHING
    launch.log_file.write_text("member 1 of 3: trains with seed 0\nmember 2 of 3: trains with seed 7\n")
    assert phase() == "training member 2 of 3"
    assert phase(has_begun=True) == PREVIEWS
    assert phase(has_begun=True, has_previews=False) == phase(has_begun=True, has_drawn=True) == TRAINING
    run.save_file.touch()
    assert phase(has_begun=True, has_drawn=True, step=2) == SAVING
    assert phase(has_begun=True, has_drawn=True, step=4) == ENDING
    run.stop_file.touch()
    assert phase(has_begun=True, has_drawn=True, step=2) == STOPPING


def test_a_card_offers_what_can_be_done_and_no_time_left_while_it_ends(context: AppContext) -> None:
    make_run(context, "one", "lora", [0.3, 0.2])
    run = replace(context.runs.get("one"), state="running", phase=TRAINING)
    assert actions_for(run, None) == ["stop", "save"]
    assert "8 s left" in run_card(run)
    ending = replace(run, phase=STOPPING)
    assert actions_for(ending, None) == []
    assert "left" not in run_card(ending)
    assert actions_for(replace(run, state="stopped", checkpoints=("checkpoint-2",)), None) == ["resume"]
    assert actions_for(replace(run, state="finished"), None) == []


def test_a_base_that_is_none_is_refused_before_the_start(context: AppContext) -> None:
    session, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    folder = context.runs.folder / "bases"
    folder.mkdir()
    values = form.write({"pretrained_model_name_or_path": str(folder), "report_to": "none"})
    for index, reason in (
        (None, "is a folder without model_index.json"),
        (
            {"_class_name": "Flux2Pipeline", "unet": None},
            "is a Flux2Pipeline without unet, neither SDXL nor FLUX.2 klein",
        ),
        ({"text_encoder": ["transformers", "CLIPTextModel"]}, "has no text_encoder_2, as Stable Diffusion 1 or 2"),
        ({"text_encoder": [None, None], "text_encoder_2": ["a", "b"]}, "has no text_encoder, as SDXL&#x27;s refiner"),
    ):
        if index is not None:
            unet = {"unet": ["diffusers", "UNet2DConditionModel"]}
            (folder / "model_index.json").write_text(json.dumps(unet | index))
        assert reason in summary(context, form, session, PLAIN, *values)
        with pytest.raises(gr.Error, match=reason.partition("&")[0]):
            start(context, form, session, "one", PLAIN, *values)
    assert context.queue.jobs() == []


@pytest.mark.parametrize(
    "setting", ["pretrained_model_name_or_path", "pretrained_vae_model_name_or_path", "init_lora"]
)
@pytest.mark.parametrize("ending", [".ckpt", ".bin", ".safetensors"])
def test_a_pickle_is_refused_before_the_start_whatever_it_is_called(
    context: AppContext, setting: str, ending: str
) -> None:
    session, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    file = context.runs.folder / f"model{ending}"
    torch.save({"a": torch.zeros(2)}, file)
    values = form.write({setting: str(file), "report_to": "none"})
    told = summary(context, form, session, PLAIN, *values)
    assert "fl-bad" in told
    assert "model" in told
    with pytest.raises(gr.Error, match="model"):
        start(context, form, session, "one", PLAIN, *values)
    assert context.queue.jobs() == []


def test_a_curve_is_smoothed_over_a_tenth_of_the_run_and_has_few_points() -> None:
    assert smooth([(step, 1.0 + step % 2) for step in range(3)]) == [(0, 1.0), (1, 2.0), (2, 1.0)]
    points = smooth([(step, float(step % 2)) for step in range(3000)])
    assert len(points) <= 300
    assert all(abs(loss - 0.5) < 0.01 for _, loss in points)


def test_the_timer_looks_at_the_runs_of_the_queue_alone(context: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    session, *_ = load_samples_icons(context, "")
    form = ConfigForm()
    start(context, form, session, "two", BOTH, *form.write({"max_train_steps": 2, "report_to": "none"}))
    make_run(context, "other", "lora", [0.1])
    looked: list[str] = []
    get = context.runs.get
    monkeypatch.setattr(context.runs, "all", lambda: pytest.fail("all runs were looked at"))

    def noted(run_id: str) -> Run:
        looked.append(run_id)
        return get(run_id)

    monkeypatch.setattr(context.runs, "get", noted)
    assert live(context, None, None)[0].count('data-state="queued"') == 2
    assert set(looked) == {"two-lora", "two-flat-lora"}
