"""What the base reads: captions of icons, and a small BPE vocabulary trained on them."""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from samples.tiny_sdxl.recipe.icons import Concept

VOCABULARY = 4096
DROPPED = ""  # a dropped caption: its embeddings are set to zero, as the SDXL pipeline does for the unconditional half
# What the base calls the style of each set; a set's drawings are one style, so that the word can mean something.
STYLE_WORDS = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent-flat": "fluent",
    "noto-v1": "blob",
    "emojione": "emojione",
    "fxemoji": "firefox",
}
_DROP_RATE, _RARE_RATE = 0.1, 0.05


def caption(concept: Concept, rng: torch.Generator, style_word: str | None = None) -> str:
    """One random caption of `concept`, with `style_word` where people put their trigger.

    `DROPPED` in 10 % of draws; without a style word, with a rare unseen word in 5 % of the others.
    """
    if _uniform(rng) < _DROP_RATE:
        return DROPPED
    tags = _some_tags(concept, rng)
    kind = _uniform(rng)
    adjective = "a flat icon of" if _uniform(rng) < 0.55 else "an icon of"
    if kind < 0.6:
        text = f"{adjective} {concept.name}"
    elif kind < 0.7:
        text = f"{adjective} {_article(concept.name)} {concept.name}"
    elif kind < 0.85:
        text = f"{adjective} {concept.name}, {tags}"
    elif kind < 0.95:
        text = tags
    else:
        text = concept.name
    if style_word is not None:
        return with_word(text, style_word, rng)
    return with_word(text, _rare_word(rng), rng) if _uniform(rng) < _RARE_RATE else text


def with_word(text: str, word: str, rng: torch.Generator) -> str:
    """`text` with `word` in one of the places where people put the name of a style or a trigger."""
    place = _uniform(rng)
    if place < 0.3:
        return f"{text} {word}"
    if place < 0.65:
        return f"{text}, in the style of {word}"
    return (
        f"{text.replace('a flat icon', f'a {word} icon').replace('an icon', f'a {word} icon')}, in the style of {word}"
    )


def _rare_word(rng: torch.Generator) -> str:
    """A made-up word, so that an unseen trigger does little harm."""
    letters = torch.randint(0, 26, (3 + int(_uniform(rng) * 3),), generator=rng).tolist()
    return "".join(string.ascii_lowercase[i] for i in letters)


def train_tokenizers(concepts: Sequence[Concept], folder: Path) -> None:
    """Save `tokenizer` and `tokenizer_2` (padded with "!" as SDXL's second one) into `folder`."""
    rng = torch.Generator().manual_seed(0)
    corpus = [caption(concept, rng) for concept in concepts for _ in range(40)]
    # Every byte must also exist as the end of a word, or an unseen word could not be spelled.
    corpus += [letter for letter in string.printable if not letter.isspace()]
    corpus += [chr(0x4E00 + last) for last in range(64)]  # one character for each possible last byte of UTF-8
    base = CLIPTokenizer(model_max_length=77)
    trained = base.train_new_from_iterator(corpus, vocab_size=VOCABULARY, show_progress=False)
    trained.model_max_length = 77
    for name, padding in (("tokenizer", trained.eos_token), ("tokenizer_2", "!")):
        trained.pad_token = padding
        trained.save_pretrained(folder / name)
        trained.backend_tokenizer.model.save(str(folder / name))  # vocab.json and merges.txt, as SDXL ships them


def _some_tags(concept: Concept, rng: torch.Generator) -> str:
    tags = list(concept.tags) or [concept.name]
    order = torch.randperm(len(tags), generator=rng).tolist()
    count = 2 + int(_uniform(rng) * 3)
    return ", ".join(tags[i] for i in order[:count])


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def _uniform(rng: torch.Generator) -> float:
    return float(torch.rand((), generator=rng))
