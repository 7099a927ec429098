"""Captions from file names, and the trigger word in captions and prompts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .save_upload import words_in_name

TRIGGER = "TOK"  # of the sample icons and of the prompts that come with the app
# Common nouns without an article.
_UNCOUNTED = re.compile(
    "bowling|bread|butter|cheese|chocolate|clothing|coffee|cooking|custard|fire|fog|food|furniture|gold|grass|hair|ice"
    "|jewelry|lightning|meat|milk|money|music|pasta|rain|rice|salt|sand|smoke|snow|spaghetti|sugar|sushi|tea|water"
    "|wine|wood"
)
_DETERMINED = re.compile(
    r"(an?|the|my|your|his|her|its|our|their|this|that|these|those|some|two|three|four|five|\d+)\b"
)
_VOWEL = re.compile(r"(?!eu|ewe|one\b|once|uni|use|uku)[aeiou]|hour|x-?ray")
_STYLE = re.compile(r"\bin the style of (\w+)")


def captions_from_names(names: Mapping[str, str], captions: Mapping[str, str], trigger: str) -> dict[str, str]:
    """`a TOK icon of a fox, in the style of TOK` for `fox.png`, by image name.

    Only for images without a caption or with one from the file name, and only for names with words.
    """
    words = {image: words_in_name(name) for image, name in names.items()}
    return {
        image: f"a {trigger} icon of {with_article(word)}, in the style of {trigger}"
        for image, word in words.items()
        if word and _is_of_name(captions[image], word)
    }


def with_article(words: str) -> str:
    """`a fox`, `an owl`, `grapes`, `my cat`: no article for plurals, mass nouns, and words with a determiner."""
    lower = words.lower()
    noun = re.split(r" (?:of|on|in|with|over|at|without) ", lower)[0].rpartition(" ")[2]
    is_plural = noun.endswith("s") and not noun.endswith(("ss", "us"))
    if is_plural or _UNCOUNTED.fullmatch(noun) or _DETERMINED.match(lower):
        return words
    return f"{'an' if _VOWEL.match(lower) else 'a'} {words}"


def trigger_of_captions(folder: Path) -> str:
    """The word that most captions in the folder name as their style; TRIGGER without one."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*.txt"))]
    found = Counter(word for text in texts for word in _STYLE.findall(text))
    return found.most_common(1)[0][0] if found else TRIGGER


def with_trigger(prompts: str, old: str, new: str) -> str:
    """`prompts` with the trigger word `new` in place of `old`."""
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, prompts)


def has_trigger(caption: str, trigger: str) -> bool:
    """Whether the caption has it as a word of its own."""
    return with_trigger(caption, trigger, "") != caption


def _is_of_name(caption: str, word: str) -> bool:
    made = rf"a (.+) icon of (an? )?{re.escape(word)}, in the style of \1"
    return caption in ("", word) or re.fullmatch(made, caption) is not None
