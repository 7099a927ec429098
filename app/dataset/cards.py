"""One card for each image: the picture as it is trained on, its caption to write in, notes, and a way to remove it.

A caption is saved on its own as soon as it is left, and only over the one that was shown: another window of the same
browser may have changed it meanwhile, and then both are shown to choose from.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from typing import Any

from PIL import Image

from flatlora_diffusion.config import ConfigError

from ..context import AppContext
from .arrivals import MOST_CAPTION_LETTERS
from .view import Card, DatasetView

CARDS_CSS = """
.fl-photos { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 190px), 1fr));
  list-style: none; margin: 0; padding: 0; }
.fl-photo { display: flex; flex-direction: column; gap: 8px; padding: 12px; border-radius: 12px; min-width: 0;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill); margin: 0; }
.fl-photo img { width: 100%; height: 150px; object-fit: contain; margin: 0; border-radius: 8px;
  background: var(--background-fill-secondary); }
.fl-photo-head { display: flex; justify-content: space-between; gap: 8px; align-items: start; }
.fl-photo b { font-weight: 600; font-size: 14px; overflow-wrap: anywhere; color: var(--body-text-color); }
.fl-photo textarea { width: 100%; min-height: 74px; resize: vertical; padding: 8px 10px; border-radius: 8px;
  font: inherit; font-size: 14px; line-height: 1.4; color: var(--body-text-color);
  background: var(--input-background-fill); border: 1px solid var(--fl-edge); }
.fl-photo p, .fl-photo [role=status] { margin: 0; font-size: 12.5px; line-height: 1.35; min-height: 1.35em;
  color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.fl-photo p:empty { display: none; }
.fl-photo button { flex: none; font: inherit; font-size: 12.5px; padding: 5px 10px; border-radius: 8px;
  cursor: pointer; color: var(--fl-danger); background: none; border: 1px solid currentColor; }
.fl-photo button:hover, .fl-photo button.fl-sure { background: var(--fl-danger); color: var(--fl-on-danger); }
.fl-photo [role=status] button { color: var(--body-text-color); margin: 4px 6px 0 0; }
.fl-photo [role=status] button:hover { background: var(--background-fill-secondary); color: var(--body-text-color); }
.fl-photo.fl-clash { border-color: var(--fl-danger); }
"""

# One listener for all cards, as the cards come and go. Enter goes on to the next caption, as in a list.
CARDS_SCRIPT = """
const session = () => element.querySelector('.fl-photos')?.dataset.session || '';
const cardOf = (event) => event.target.closest('.fl-photo');
const say = (card, text) => { card.querySelector('[role=status]').textContent = text; };
const save = async (card) => {
  const field = card.querySelector('textarea');
  if (field.value === field.defaultValue || card.classList.contains('fl-clash')) return;
  const text = field.value;
  say(card, 'Saving ...');
  let answer;
  try {
    const {image, version} = card.dataset;
    answer = await server.save_card({session: session(), image, version, text});
  } catch (error) { answer = {told: 'Not saved: the app does not answer. Change it again to try once more.'}; }
  say(card, answer.told);
  if (answer.version === undefined) return;
  card.dataset.version = answer.version;
  if (answer.is_saved) { field.defaultValue = answer.text; trigger('input'); return; }
  card.classList.add('fl-clash');
  for (const [label, value] of [['Keep mine', text], ['Take the other', answer.text]]) {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = label;
    button.addEventListener('click', (event) => {
      event.stopPropagation();
      card.classList.remove('fl-clash');
      field.defaultValue = answer.text;
      field.value = value;
      say(card, '');
      field.focus();
      save(card);
    });
    const place = card.querySelector('[role=status]');
    place.append(place.querySelector('button') ? '' : document.createElement('br'), button);
  }
};
element.addEventListener('change', (event) => { if (event.target.matches('textarea')) save(cardOf(event)); });
element.addEventListener('keydown', (event) => {
  if (!event.target.matches('textarea') || event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  const fields = [...element.querySelectorAll('textarea')];
  const next = fields[fields.indexOf(event.target) + 1];
  next ? next.focus() : event.target.blur();
});
element.addEventListener('click', async (event) => {
  const button = event.target.closest('button[data-remove]');
  if (!button) return;
  if (!button.classList.contains('fl-sure')) {
    button.classList.add('fl-sure');
    button.textContent = 'Remove it?';
    button.addEventListener('blur', () => { button.classList.remove('fl-sure'); button.textContent = 'Remove'; },
      {once: true});
    return;
  }
  const card = cardOf(event), other = card.nextElementSibling || card.previousElementSibling;
  const answer = await server.remove_card({session: session(), image: card.dataset.image});
  if (answer.told) { say(card, answer.told); return; }
  other?.querySelector('textarea').focus();
  card.remove();
  trigger('submit');
});
"""


def cards_page(view: DatasetView, session: str) -> str:
    """All cards as one list."""
    cards = "".join(map(_card, view.cards))
    return f'<ul class="fl-photos" data-session="{escape(session)}">{cards}</ul>'


def card_functions(context: AppContext) -> list[Callable[[dict[str, Any]], dict[str, Any]]]:
    """What the cards call: `save_card` and `remove_card`. Each takes and returns an object of the page."""

    def save_card(asked: dict[str, Any]) -> dict[str, Any]:
        """The caption's new version and text; of another window's, when that was quicker."""
        session, image, version, text = (str(asked.get(name, "")) for name in ("session", "image", "version", "text"))
        try:
            kept = context.uploads.save_caption(session, image, version, text)
        except ConfigError as error:
            return {"told": f"Not saved: {error}"}
        told = "Saved" if kept.is_saved else f"Not saved, as another window has written: {kept.text or 'nothing'}"
        return {"version": kept.version, "text": kept.text, "is_saved": kept.is_saved, "told": told}

    def remove_card(asked: dict[str, Any]) -> dict[str, Any]:
        """Nothing to tell when the image is gone."""
        try:
            context.uploads.remove(str(asked.get("session", "")), str(asked.get("image", "")))
        except ConfigError as error:
            return {"told": f"Not removed: {error}"}
        return {"told": ""}

    return [save_card, remove_card]


def _card(card: Card) -> str:
    name, notes = escape(card.name), escape(" · ".join(card.notes))
    return (
        f'<li class="fl-photo" data-image="{card.image}" data-version="{card.version}">'
        f'<img src="{_data_url(card.picture)}" alt="" loading="lazy">'
        f'<div class="fl-photo-head"><b>{name}</b><button type="button" data-remove aria-label="Remove {name}">Remove'
        f'</button></div><textarea aria-label="Caption of {name}" maxlength="{MOST_CAPTION_LETTERS}" '
        f'placeholder="What is to be seen, with the trigger word">{escape(card.caption)}</textarea>'
        f'<p>{notes}</p><span role="status"></span></li>'
    )


def _data_url(picture: Image.Image) -> str:
    """Small enough to be in the page itself: the uploads are private, and no address serves them."""
    packed = io.BytesIO()
    picture.save(packed, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(packed.getvalue()).decode()}"
