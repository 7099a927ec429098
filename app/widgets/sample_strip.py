"""The samples of runs over their steps: a row for each prompt, with the picture from before the training first.

It grows at its right end while a run goes on, and stays there unless somebody has moved it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from ..context import AppContext
from ..runs.progress import Preview
from ..runs.runs import Run
from .html import file_url
from .theme import NO_METHOD

MOST_COLUMNS = 24
STRIP_CSS = """
.fl-strips { display: grid; gap: 10px; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); }
.fl-strip { margin: 0; padding: 12px 14px; border: 1px solid var(--border-color-primary); border-radius: 12px;
  background: var(--block-background-fill); color: var(--body-text-color); min-width: 0; }
.fl-strip-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: 2px 10px; margin: 0 0 6px; }
.fl-strip-head b { font-weight: 600; font-size: 14px; overflow-wrap: anywhere; }
.fl-strip-head i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 6px; }
.fl-strip-head span { font-size: 12.5px; color: var(--body-text-color-subdued); }
.fl-film { overflow-x: auto; max-width: 100%; }
.fl-film table { border: 0; border-collapse: separate; border-spacing: 0; width: auto; margin: 0 !important; }
.fl-film th, .fl-film td { border: 0; padding: 0 8px 6px 0; text-align: left; vertical-align: top; font-size: 12.5px;
  font-weight: 400; background: none; color: var(--body-text-color-subdued); white-space: nowrap; }
.fl-film tr { background: none; border: 0; }
.fl-film .fl-before { position: sticky; left: 0; z-index: 1; background: var(--block-background-fill); }
.fl-film td.fl-before { border-right: 2px solid var(--border-color-primary); }
.fl-film td.fl-before + td, .fl-film th.fl-before + th { padding-left: 8px; }
.fl-film th[scope=rowgroup] { padding-top: 6px; color: var(--body-text-color); }
.fl-film th[scope=rowgroup] span { position: sticky; left: 0; display: inline-block; white-space: normal;
  max-width: min(60ch, 70vw); overflow-wrap: anywhere; font-size: 13px; }
.fl-film button, .fl-film .fl-none { display: block; padding: 0; overflow: hidden; border-radius: 8px;
  width: var(--sample, 104px); height: var(--sample, 104px); border: 1px solid var(--border-color-primary);
  background: var(--background-fill-secondary); cursor: zoom-in; transition: none; }
.fl-film .fl-none { border-style: dashed; cursor: default; }
.fl-film button[aria-pressed=true] { cursor: zoom-out; }
.fl-film img { display: block; width: 100%; height: 100%; margin: 0; object-fit: contain; }
"""
# A picture enlarges all of its strip to half the width, so that it stands beside the one from before. What is large,
# where the strip stands and which picture has the focus outlasts the drawing of a new column.
STRIP_SCRIPT = """
const large = new Set(), places = new Map();
let held = null;
const films = () => [...element.querySelectorAll('.fl-film')];
const keyOf = (button) => button.closest('.fl-film').dataset.run + ' ' + button.dataset.sample;
const dress = (film) => {
  const is_large = large.has(film.dataset.run);
  const half = Math.max(130, Math.min(420, (film.clientWidth - 20) / 2));
  film.style.setProperty('--sample', is_large ? half + 'px' : '');
  film.querySelectorAll('button').forEach((one) => one.setAttribute('aria-pressed', is_large));
};
const drawn = () => films().forEach((film) => {
  dress(film);
  film.scrollLeft = places.get(film.dataset.run) ?? film.scrollWidth;
  const again = held && [...film.querySelectorAll('button')].find((one) => keyOf(one) === held);
  if (again && document.activeElement === document.body) again.focus({preventScroll: true});
});
element.addEventListener('scroll', ({target: film}) => {
  if (!film.matches('.fl-film')) return;
  const is_at_end = film.scrollLeft + film.clientWidth > film.scrollWidth - 8;
  is_at_end ? places.delete(film.dataset.run) : places.set(film.dataset.run, film.scrollLeft);
}, true);
element.addEventListener('focusin', (event) => {
  const button = event.target.closest('button[data-sample]');
  held = button && keyOf(button);
});
element.addEventListener('focusout', (event) => { if (event.relatedTarget) held = null; });
const toggle = (button, to) => {
  const film = button.closest('.fl-film'), run = film.dataset.run;
  to ? large.add(run) : large.delete(run);
  dress(film);
  button.scrollIntoView({block: 'nearest', inline: 'end'});
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-sample]');
  if (button) toggle(button, button.getAttribute('aria-pressed') !== 'true');
});
element.addEventListener('keydown', (event) => {
  const button = event.target.closest('button[data-sample]');
  if (button && event.key === 'Escape') toggle(button, false);
});
watch('value', drawn);
drawn();
"""


def strips(context: AppContext, runs: Sequence[Run], colours: Mapping[str, str]) -> str:
    """HTML of the samples of each run that has any; empty without. colours: of the runs, by name."""
    found = [(run, context.runs.previews(run.id)) for run in runs]
    made = "".join(_strip(run, previews, colours.get(run.name, NO_METHOD)) for run, previews in found if previews)
    return made and f'<div class="fl-strips">{made}</div>'


def shown_steps(steps: Sequence[int]) -> list[int]:
    """At most MOST_COLUMNS of the steps: the first and the last, and those between at equal distances."""
    every = -(-len(steps) // (MOST_COLUMNS - 1))
    return sorted({*steps[::every], *steps[-1:]})


def rows_of(previews: Sequence[Preview]) -> dict[str, dict[int, Preview]]:
    """The pictures by row and step: a row for each prompt, of several seeds one for each.

    Those of a version that did not tell their prompts are counted.
    """
    seeds = Counter(prompt for prompt, _ in {(one.prompt, one.seed) for one in previews})
    rows: dict[str, dict[int, Preview]] = {}
    for one in previews:
        title = f"Preview {one.place + 1}" if one.prompt is None else one.prompt or "(empty prompt)"
        if one.prompt is not None and seeds[one.prompt] > 1:
            title = f"{title} · seed {one.seed}"
        rows.setdefault(title, {})[one.step] = one
    return rows


def _strip(run: Run, previews: Sequence[Preview], colour: str) -> str:
    steps = sorted({one.step for one in previews})
    columns = shown_steps(steps)
    some = "" if len(columns) == len(steps) else f"<span>{len(columns)} of {len(steps)} steps</span>"
    name = escape(run.name)
    heads = "".join(f'<th scope="col"{_kind(step)}>{_title(step)}</th>' for step in columns)
    bodies = "".join(_row(place, *row, columns) for place, row in enumerate(rows_of(previews).items()))
    table = f"<table><thead><tr>{heads}</tr></thead>{bodies}</table>"
    return (
        f'<section class="fl-strip" aria-label="Samples of {name}"><p class="fl-strip-head">'
        f'<b><i style="background:{colour}"></i>{name}</b>{some}</p>'
        f'<div class="fl-film" data-run="{escape(run.id)}">{table}</div></section>'
    )


def _row(place: int, title: str, pictures: Mapping[int, Preview], columns: Sequence[int]) -> str:
    text = escape(title)
    cells = "".join(f"<td{_kind(step)}>{_cell(place, text, step, pictures.get(step))}</td>" for step in columns)
    head = f'<tr><th scope="rowgroup" colspan="{len(columns)}"><span>{text}</span></th></tr>'
    return f"<tbody>{head}<tr>{cells}</tr></tbody>"


def _cell(place: int, text: str, step: int, preview: Preview | None) -> str:
    if preview is None or not preview.path.is_file():
        return '<span class="fl-none"></span>'
    return (
        f'<button type="button" data-sample="{place} {step}" aria-pressed="false" title="Larger or smaller">'
        f'<img src="{file_url(preview.path)}" alt="{text}, {_title(step).lower()}" loading="lazy" draggable="false">'
        "</button>"
    )


def _title(step: int) -> str:
    return f"Step {step}" if step else "Before training"


def _kind(step: int) -> str:
    return "" if step else ' class="fl-before"'
