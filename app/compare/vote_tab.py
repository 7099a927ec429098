"""The blind vote on the page: two pictures without names, three answers, and the verdict on top at the end."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from flatlora_diffusion.config import ConfigError

from ..process.database import Choice
from ..widgets.confirm import build_confirmation, confirm_before
from ..widgets.status import STATUS_CSS, error_line, status_line
from .blind_vote import QUESTIONS
from .comparison import MIN_PAIRS
from .view import CompareView, Form
from .vote_view import BASE, NO_BALLOT, VOTE_CSS, VOTE_KEYS, Ballot, VoteView


def build_vote(
    view: CompareView,
    form: list[gr.components.Component],
    known: gr.State,
    voter: gr.BrowserState,
    load: Callable[..., Any],
) -> None:
    votes = VoteView(view)
    ballot = gr.State(None)
    with gr.Row():
        first = gr.Dropdown([], label="One column", min_width=160)
        second = gr.Dropdown([], label="The other", min_width=160)
        question = gr.Radio(list(QUESTIONS), value=QUESTIONS[0], label="Question")
        order = gr.Number(1, label="Order", info="Another number gives another order.", precision=0, min_width=120)
    start = gr.Button("Start", variant="primary", elem_id="fl-vote-start")
    status = gr.HTML("", css_template=STATUS_CSS)
    count = gr.HTML("", elem_id="fl-vote-count")
    page = gr.HTML(NO_BALLOT, css_template=VOTE_CSS, js_on_load=VOTE_KEYS, elem_id="fl-vote")
    with gr.Row(visible=False) as answers:
        left = gr.Button("1 · Left", elem_id="fl-vote-left", min_width=90)
        right = gr.Button("2 · Right", elem_id="fl-vote-right", min_width=90)
        tie = gr.Button("3 · Tie", elem_id="fl-vote-tie", min_width=90)
    with gr.Column(visible=False) as ending:
        reveal = gr.Button("End without a verdict", variant="stop", elem_id="end-vote", size="sm")
        really = build_confirmation("end-vote", "Yes, end without a verdict", "No, go on voting")
    shown = [page, count, answers, ending]
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def on_start(voter: str, first: str, second: str, question: str, order: float, *values: Any) -> tuple[Any, ...]:
        try:
            new = votes.start(Form(*values), (first, second), question, int(order or 0), voter)
        except ConfigError as error:
            return None, error_line(str(error)), NO_BALLOT, "", gr.update(visible=False), gr.update(visible=False)
        return new, few_pairs(new), *vote_outputs(votes, new)

    def on_vote(choice: Choice) -> Callable[[Ballot | None], tuple[Any, ...]]:
        def vote(ballot: Ballot | None) -> tuple[Any, ...]:
            if ballot is None:
                return (gr.skip(),) * len(shown)
            votes.vote(ballot, choice)
            return vote_outputs(votes, ballot)

        return vote

    def on_reveal(ballot: Ballot) -> tuple[Any, ...]:
        ended = replace(ballot, is_revealed=True)
        return ended, *vote_outputs(votes, ended)

    load(lambda voter: voter or secrets.token_hex(8), voter, voter, **quiet)
    gr.on([known.change, form[0].input], partial(column_choices, view), form[0], [first, second], **quiet)
    started = start.click(on_start, [voter, first, second, question, order, *form], [ballot, status, *shown], **quiet)
    started.then(**really.hidden)
    answered: list[tuple[gr.Button, Choice]] = [(left, "left"), (right, "right"), (tie, "tie")]
    for button, choice in answered:
        button.click(on_vote(choice), ballot, shown, concurrency_id="vote", **quiet)
    confirm_before(reveal, really)
    really.yes.click(on_reveal, ballot, [ballot, *shown], **quiet).then(**really.hidden)


def column_choices(view: CompareView, runs: list[str]) -> tuple[Any, Any]:
    """The columns to vote on; initially the last two of the comparison."""
    names = {arm.id: f"{arm.title} ({arm.name})" for arm in view.arms()}
    columns = [("Base", BASE), *((names[run], run) for run in runs if run in names)]
    first = columns[-2][1] if len(columns) > 1 else BASE
    return gr.update(choices=columns, value=first), gr.update(choices=columns, value=columns[-1][1])


def few_pairs(ballot: Ballot) -> str:
    """Advice for a ballot with too few pairs."""
    count = len(ballot.pairs)
    if count >= MIN_PAIRS:
        return ""
    return status_line(f"Only {count} pairs: too few for a clear result. Draw more prompts or seeds for a vote.")


def vote_outputs(votes: VoteView, ballot: Ballot) -> tuple[Any, ...]:
    """(page, count, the row of answers, the column that ends)."""
    page = votes.page(ballot)
    return page.question, page.count, gr.update(visible=page.is_open), gr.update(visible=page.is_open)
