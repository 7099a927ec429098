"""The tab where trainings are set up, started and watched."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from flatlora_diffusion.config import METHODS, ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.families.base_title import included_title
from flatlora_diffusion.families.registry import base_title

from ..context import AppContext
from ..dataset.view import training_size
from ..forms.forms import PLACED_WITH_THE_IMAGES, PRESETS, ConfigForm, preset_settings
from ..forms.labels import LABELS, with_labels
from ..process.database import Job
from ..runs.names import checked_text
from ..widgets.browser_memory import remember_fields
from ..widgets.confirm import Confirmation, build_confirmation, confirm_after, confirm_before
from ..widgets.html import read_static
from ..widgets.loss_chart import CHART_CSS
from ..widgets.messages import note, show_errors
from ..widgets.run_cards import CARDS_CSS, CARDS_SCRIPT, duration
from ..widgets.sample_strip import STRIP_CSS, STRIP_SCRIPT
from ..widgets.ticks import fingerprint_of, skip_unchanged
from .actions import connect_actions
from .base_check import check_start
from .estimates import disk_estimate, disk_full_text, disk_line, estimate_time, has_gpu, memory_of, total_steps
from .live_view import NOTHING, LiveOutputs, live

BOTH, FLAT, PLAIN = "both, as a fair pair", METHODS["flat-lora"].title, METHODS["lora"].title
_FIRST = ("pretrained_model_name_or_path", "max_train_steps", "rank", "learning_rate", "sigma")
_SAMPLED = "validation_prompt"
_SECOND = ("resolution", "train_batch_size", "num_validation_images", "validation_epochs", "seed")
METHOD_HINT = (
    "Flat-LoRA adds a little noise to the base while it trains; on the tiny demo base it was no better than LoRA "
    "where both were tuned. The pair trains both with the same seed, one after the other, for the Compare tab."
)
_MORE_METHODS = read_static("more_methods.js")
_PRESET_HINT = (
    "Quick look: minutes on the tiny demo base. Paper: the settings of the Flat-LoRA paper. "
    "Low memory: small GPUs. Quality: longer, a larger LoRA, the average of two. "
    "Illustrious: its family, with captions of tags. FLUX.2 klein: klein-base-4B on a GPU."
)
_COUNTING = '<div class="fl-card fl-faint">Estimating the training …</div>'
_NO_LOSS = '<div class="fl-card fl-faint">No loss yet: the curve starts with the first training steps.</div>'
_SECONDS = 1.5


@dataclass(frozen=True)
class TrainTab:
    """The parts that other tabs use.

    Attributes:
        timer: inactive at first.
        compare: the button that goes on to the Compare tab with the newest runs.
        summary: the event that updates the summary.
    """

    timer: gr.Timer
    compare: gr.Button
    name: gr.Textbox
    method: gr.Radio
    status: gr.HTML
    summary: dict[str, Any]


def start(context: AppContext, form: ConfigForm, session: str, name: str, method: str, *values: Any) -> str:
    """Queue the training that the form describes; returns a confirmation."""
    with show_errors():
        jobs = queue_training(context, form.read(values, _name_of(method)), session, name, method == BOTH)
    names = " and ".join(html.escape(str(job.run)) for job in jobs)
    order = ", one after the other" if len(jobs) > 1 else ""
    return f'<div class="fl-card" role="status"><b>Queued:</b> {names}{order}. Watch under Progress.</div>'


def start_with_room(
    context: AppContext, form: ConfigForm, session: str, name: str, method: str, *values: Any
) -> tuple[str, Any]:
    """Queue the training if the disk has room; else explain, and ask whether to start anyway."""
    with show_errors():
        config, captions = _read(context, form, session, method, values)
        disk = disk_estimate(context, config, len(captions), _arms(method))
    if disk is not None and not disk.is_enough:
        return note(disk_full_text(disk), "fl-bad"), gr.Row(visible=True)
    return start(context, form, session, name, method, *values), gr.Row(visible=False)


def queue_training(context: AppContext, config: TrainConfig, session: str, name: str, is_pair: bool) -> list[Job]:
    """Queue one training, or a pair with Flat-LoRA's `config`, on the current upload.

    Raises ConfigError for wrong settings.
    """
    name = checked_text("name", name)
    if not name:
        raise ConfigError("the run has no name; give it one")
    context.allowed_paths.check(config)
    check_start(config)
    config = with_images(context, config, session)
    if config.data.instance_data_dir is not None:
        load_samples(Path(config.data.instance_data_dir), config.data.instance_prompt, config.data.caption_column)
    if is_pair:
        return context.queue.add_pair(config, name, session)
    return [context.queue.add_training(config, name, session)]


def with_images(context: AppContext, config: TrainConfig, session: str) -> TrainConfig:
    """The config with a frozen copy of the upload, unless it names other images."""
    if config.data.is_given:
        return config
    if not session:
        raise ConfigError("there are no images to train on; upload some first")
    captions = context.uploads.captions(session)
    if captions:  # without any, freeze says so
        _check_images(captions, config.data.instance_prompt)
    return config.replace(instance_data_dir=str(context.uploads.freeze(session)))


def summary(context: AppContext, form: ConfigForm, session: str, method: str, *values: Any) -> str:
    """The planned training with its time and memory, or the reason why it cannot start."""
    try:
        config, captions = _read(context, form, session, method, values)
        lines = _facts(context, config, captions, _arms(method))
    except ConfigError as error:
        return f'<div class="fl-card fl-bad">{html.escape(with_labels(str(error)))}</div>'
    return '<div class="fl-card"><b>Before the start</b><br>' + "<br>".join(lines) + "</div>"


def build_train_tab(
    context: AppContext,
    form: ConfigForm,
    session: gr.BrowserState,
    load: Callable[..., Any],
    opened: Callable[..., Any],
) -> TrainTab:
    """Build the tab into the Blocks that is open.

    `load`: the page's load event; `opened`: that of the tab coming to the front.
    """
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            with gr.Group():
                name = gr.Textbox("my-style", label="Name", info="of the run and its LoRA file", elem_id="run-name")
                method = gr.Radio(method_choices(), value=BOTH, label="Train", info=METHOD_HINT, elem_id="method")
                more = gr.Button("More methods", size="sm", elem_id="more-methods")
                preset = gr.Radio(list(PRESETS), value="Quick look", label="Preset", info=_PRESET_HINT)
            _place_first(form)
            _place_the_rest(form)
        with gr.Column(scale=3, min_width=300):
            summary_card = gr.HTML(_COUNTING, elem_id="summary", padding=False)
            begin = gr.Button("Start training", variant="primary", elem_id="start")
            queued = gr.HTML(padding=False, elem_id="queued")
            all_the_same = build_confirmation("start", "Start anyway", "Do not start", "primary")
            shown, cancel, question = _build_progress()
    more.click(None, None, [more], js=_MORE_METHODS)
    remember_fields(load, "train", {"name": name, "method": method, "preset": preset, **form.by_name})
    summary_inputs = [session, method, *form.components]
    tell = {
        "fn": partial(summary, context, form),
        "outputs": [summary_card],
        "show_progress": "hidden",
        "api_name": "summary",
    }
    triggers = [method.change, *(item.change for item in form.components)]
    gr.on(triggers, inputs=summary_inputs, trigger_mode="always_last", **tell)
    filled = [method, *form.components]
    preset.input(partial(apply_preset, form), [preset, *filled], filled, show_progress="hidden")
    ordered = [session, name, method, *form.components]
    room: dict[str, Any] = {"outputs": [queued, all_the_same.row], "api_visibility": "private"}
    begun = begin.click(partial(start_with_room, context, form), ordered, **room)
    confirm_after(begun, begin, all_the_same)
    yes = all_the_same.yes.click(partial(start, context, form), ordered, [queued], api_name="start")
    yes.then(**all_the_same.hidden)
    for event in (begun, yes):
        event.then(**question.hidden)
    watch = {
        "fn": partial(live, context),
        "inputs": [shown["log_of"], shown["seen"]],
        "outputs": [shown[name] for name in LiveOutputs._fields],
        "show_progress": "hidden",
    }
    timer = gr.Timer(_SECONDS, active=False)
    timer.tick(**skip_unchanged(watch, lambda: fingerprint_of(context, context.queue.recent_runs())), api_name="live")
    load(**watch, api_visibility="private")
    session.change(inputs=summary_inputs, **tell | {"api_visibility": "private"})
    opened(inputs=summary_inputs, **tell | {"api_visibility": "private"})
    confirm_before(cancel, question)
    connect_actions(context, session, shown["cards"], question, watch)
    return TrainTab(
        timer, shown["compare"], name, method, queued, {"inputs": summary_inputs, **tell, "api_visibility": "private"}
    )


def _build_progress() -> tuple[dict[str, Any], gr.Button, Confirmation]:
    """The live view by the fields of `LiveOutputs`, the button that cancels all waiting jobs, and its confirmation."""
    shown: dict[str, Any] = {"seen": gr.State(None)}
    gr.Markdown("## Progress")
    shown["cards"] = gr.HTML(NOTHING, css_template=CARDS_CSS, js_on_load=CARDS_SCRIPT, elem_id="live", padding=False)
    shown["compare"] = gr.Button("Next: compare", variant="primary", visible=False, elem_id="go-on")
    with gr.Column(visible=False) as shown["cancelling"]:
        cancel = gr.Button("Cancel all waiting jobs", variant="stop", size="sm", elem_id="cancel-all")
        question = build_confirmation("cancel-all", "Yes, cancel all waiting jobs", "No, keep them")
    shown["no_loss"] = gr.HTML(_NO_LOSS, visible=False, padding=False)
    shown["curves"] = gr.HTML("", css_template=CHART_CSS, elem_id="loss", visible=False, padding=False)
    shown["samples"] = gr.HTML(
        "", css_template=STRIP_CSS, js_on_load=STRIP_SCRIPT, elem_id="samples", visible=False, padding=False
    )
    shown["log_of"] = gr.Radio([], label="Log of", visible=False)
    shown["log"] = gr.Textbox(label="Log", lines=6, max_lines=12, autoscroll=True, elem_id="log", visible=False)
    return shown, cancel, question


def _place_first(form: ConfigForm) -> None:
    form.by_name[_FIRST[0]].render()
    for pair in (_FIRST[1:3], _FIRST[3:5]):
        with gr.Row():
            for item in pair:
                form.by_name[item].render()
    form.by_name[_SAMPLED].render()


def _place_the_rest(form: ConfigForm) -> None:
    with gr.Accordion("More settings", open=False, elem_id="more-settings"):
        for item in _SECOND:
            form.by_name[item].render()
        for title, names in form.sections.items():
            with gr.Accordion(title, open=False):
                for item in names:
                    if item not in (*_FIRST, _SAMPLED, *_SECOND, *PLACED_WITH_THE_IMAGES):
                        form.by_name[item].render()


def apply_preset(form: ConfigForm, preset: str, method: str, *values: Any) -> list[Any]:
    """The method and the form with the preset; values that a preset keeps stay as typed, even if wrong.

    A preset of a method outside of the pair selects that method; otherwise the choice stays.
    """
    settings = preset_settings(preset, dict(zip(form.by_name, values, strict=True)))
    own = METHODS[settings["method"]].title
    return [method if own == FLAT else own, *form.write(settings)]


def method_choices() -> list[tuple[str, str]]:
    """(label, title) of each choice: the pair, its two methods, then the rivals with their hints."""
    rivals = [(f"{row.title}: {row.hint}", row.title) for row in METHODS.values() if row.hint]
    return [*((title, title) for title in (BOTH, PLAIN, FLAT)), *rivals]


def _name_of(method: str) -> str:
    """The setting for what was chosen: of a pair that of its flat arm."""
    title = FLAT if method == BOTH else method
    return next(name for name, row in METHODS.items() if row.title == title)


def _arms(method: str) -> int:
    return 2 if method == BOTH else 1


def _read(
    context: AppContext, form: ConfigForm, session: str, method: str, values: Sequence[Any]
) -> tuple[TrainConfig, dict[str, str]]:
    """The config, and the captions of the upload; no captions if the config names other images.

    Raises ConfigError for wrong settings.
    """
    config = form.read(values, _name_of(method))
    context.allowed_paths.check(config)
    check_start(config)
    if config.data.is_given:
        return config, {}
    captions = context.uploads.captions(session) if session else {}
    _check_images(captions, config.data.instance_prompt)
    return config, captions


def _check_images(captions: Mapping[str, str], instance_prompt: str | None) -> None:
    """Raises ConfigError without images, and for images without a caption or a prompt in its place."""
    if not captions:
        raise ConfigError("no images yet; drop some in the Dataset tab or load the sample icons there")
    bare = sum(not text for text in captions.values())
    if bare and not (instance_prompt or "").strip():
        raise ConfigError(
            f"{bare} of {len(captions)} images have no caption; write them in the Dataset tab, or give an "
            "Instance prompt under More settings, which then stands for each of them"
        )


def _other_images(config: TrainConfig) -> str:
    place = html.escape(str(config.data.instance_data_dir or config.data.dataset_name or config.data.dataset_config))
    return f"the images of {place}, not those in the Dataset tab"


def _memory_line(needed: float) -> str:
    if not has_gpu():
        return "no GPU here: it trains on the processor, which is fast enough for the small included bases only"
    return f"memory: about {needed / 2**20:,.0f} MiB of the GPU's"


def _facts(context: AppContext, config: TrainConfig, captions: dict[str, str], arms: int) -> list[str]:
    count = len(captions)
    size = training_size(config.model, config.data.resolution)
    steps = total_steps(config, count) if count else config.optim.max_train_steps
    images = (
        f"{count} images, captions {sum(map(bool, captions.values()))}/{count}" if count else _other_images(config)
    )
    base = f"base: {html.escape(base_title(config.model))}"
    if included_title(config.model):
        base += f"; for work of your own choose another {LABELS['pretrained_model_name_or_path']}"
    lines = [base, f"{images}, at {size} x {size} pixels"]
    for_each = " for each of LoRA and Flat-LoRA" if arms == 2 else ""
    lines.append(f"{steps or 'as many as the images need'} steps{for_each}")
    if count and steps:
        batch = config.optim.train_batch_size * config.optim.gradient_accumulation_steps
        lines[-1] += f"; each image is seen about {round(steps * batch / count)} times"
    time = estimate_time(config, count, context.runs) if count else None
    estimate = f"about {duration(arms * time.seconds)}, as fast as {html.escape(time.run)}" if time else ""
    lines.append(f"time: {estimate or 'unknown until the first run'}")
    memory = memory_of(config)
    if memory is not None:
        lines.append(_memory_line(memory.total))
    disk = disk_estimate(context, config, count, arms)
    if disk is not None:
        lines.append(disk_line(disk))
    return lines
