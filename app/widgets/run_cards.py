"""A run as a card: progress, phase, errors and buttons; and the displayed names of methods and bases."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from flatlora_diffusion.config import METHODS, ModelConfig
from flatlora_diffusion.families.base_title import included_title
from flatlora_diffusion.gallery.png_text import bare_name

from ..forms.labels import with_labels
from ..runs.names import IMPORTED
from ..runs.runs import Run
from ..runs.state import TRAINING
from .html import read_static
from .theme import COLOURS, NO_METHOD

_LAST_LINES = 12
# What packages print while they are imported; nobody can act on it, and it hides the training's own lines.
_NOISE = re.compile(
    r"Failed to load .*(kernels-community|torchao)"
    r"|Unable to import `torchao`"
    r"|Warning: Detected no triton"
    r"|[WI]\d{4} \d\d:\d\d:\d\d\.\d+ .*(site|dist)-packages"
    r"|(?!  File ).*(site|dist)-packages.*: \w*Warning: "
    r"|Loading (pipeline components|weights|checkpoint shards)\b.*\d+%"
)
_STATES = {"queued": "waiting for its turn"}
STOP, SAVE, RESUME, CANCEL, EARLIER = "stop", "save", "resume", "cancel", "earlier"
_BUTTONS = {
    STOP: ("Stop", "saves and ends after this step; can be resumed"),
    SAVE: ("Save now", "saves a checkpoint and continues"),
    RESUME: ("Resume", "continues from the last checkpoint"),
    CANCEL: ("Cancel", "removes it from the queue"),
    EARLIER: ("Earlier", "moves it up in the queue"),
}
_ASKED = (STOP, CANCEL)
CARDS_CSS = read_static("run_cards.css")
CARDS_SCRIPT = read_static("run_cards.js")


def run_card(run: Run, acts: Sequence[str] = ()) -> str:
    """Progress of one run, the error of a failed run with its last log lines, and buttons for `acts`."""
    progress = run.progress
    facts = [f"step {progress.step}" + (f" of {progress.total}" if progress.total else "")]
    if progress.seconds_per_step is not None:
        facts.append(f"{progress.seconds_per_step:.2f} s/step")
    if run.phase == TRAINING and progress.eta_seconds is not None:
        facts.append(f"{duration(progress.eta_seconds)} left")
    done = round(100 * progress.fraction)
    name, colour = html.escape(run.name), COLOURS.get(method_name(run.method), NO_METHOD)
    state = html.escape(run.phase or _STATES.get(run.state, run.state))
    card = (
        f'<div class="fl-card" data-state="{run.state}" role="group" aria-label="{name}"><div class="fl-head">'
        f'<b>{name}</b><span role="status">{state}</span></div>'
        f'<div class="fl-track" role="progressbar" aria-label="Progress of {name}" aria-valuenow="{done}"'
        f' aria-valuemin="0" aria-valuemax="100"><div class="fl-fill" style="width:{100 * progress.fraction:.1f}%;'
        f'background:{colour}"></div></div><span class="fl-faint">{" · ".join(facts)}</span>'
    )
    if run.advice:
        tone = "fl-bad" if run.state in ("failed", "interrupted") else "fl-faint"
        card += f'<p class="{tone}">{html.escape(with_labels(run.advice))}</p>'
    log = training_lines(run.log)[-_LAST_LINES:]
    if log:
        card += f'<pre tabindex="0">{html.escape(chr(10).join(log))}</pre>'
    return card + action_buttons(acts, run.id) + "</div>"


def waiting_card(text: str, acts: Sequence[str], of: str) -> str:
    """The card of a job that is not a training."""
    name = html.escape(text)
    return f'<div class="fl-card" role="group" aria-label="{name}">{name}{action_buttons(acts, of)}</div>'


def action_buttons(acts: Sequence[str], of: str) -> str:
    """The buttons of one card."""
    made = "".join(_action_button(act, html.escape(of)) for act in acts)
    return f'<div class="fl-acts">{made}</div>' if made else ""


def _action_button(act: str, of: str) -> str:
    text, title = _BUTTONS[act]
    sure = f' class="fl-ends" data-name="{text}" data-sure="{text} it?"' if act in _ASKED else ""
    return f'<button type="button"{sure} data-act="{act}" data-of="{of}" title="{title}">{text}</button>'


def method_name(method: str | None) -> str:
    """The displayed name of a method."""
    if method == IMPORTED:
        return "Imported"
    return METHODS[method].title if method in METHODS else method or ""


def training_lines(lines: Sequence[str]) -> list[str]:
    """The log without import noise of packages and source lines of warnings."""
    kept = []
    was_noise = False
    for line in lines:
        is_source = was_noise and line.startswith("  ")
        was_noise = _NOISE.match(line) is not None
        if not (was_noise or is_source):
            kept.append(line)
    return kept


def duration(seconds: float) -> str:
    """`40 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def base_name(name_or_path: str) -> str:
    """`the tiny demo base`, a hub id, or the last part of a path; empty for no base."""
    if not name_or_path:
        return ""
    return included_title(ModelConfig(name_or_path)) or bare_name(name_or_path)
