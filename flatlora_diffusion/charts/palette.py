"""The colour, line style and marker of each method, for all charts, the report's page and the app."""

from __future__ import annotations

from typing import NamedTuple

from flatlora_diffusion.config import METHODS


class Tone(NamedTuple):
    """A colour for the light and the dark theme."""

    light: str
    dark: str


class Look(NamedTuple):
    """The look of a method, recognizable without its colour too.

    shades: colours of further runs of the same method. dashes: lengths of dashes and gaps in points, empty for a solid
    line. marker: matplotlib's name.
    """

    name: str
    tone: Tone
    shades: tuple[Tone, ...]
    dashes: tuple[float, ...]
    marker: str

    @property
    def tones(self) -> dict[str, Tone]:
        """The tones by CSS variable: `lora`, `lora-2`, ..."""
        return {self.name: self.tone} | {f"{self.name}-{number}": tone for number, tone in enumerate(self.shades, 2)}

    @property
    def colours(self) -> tuple[str, ...]:
        """The colours in the light theme."""
        return tuple(tone.light for tone in self.tones.values())


PAPER, INK = Tone("#fdfdfb", "#15171a"), Tone("#1c2025", "#e9e7e2")
FAINT, RULE = Tone("#5c636c", "#a3a9b1"), Tone("#dfe0da", "#33373d")

BASE = Look("base", Tone("#7b828b", "#9aa1aa"), (), (1.5, 3.5), "s")
LORA = Look(
    "lora", Tone("#cf7600", "#f0a23c"), (Tone("#f2ad4e", "#ffd6a0"), Tone("#8a4f00", "#b8741a")), (7, 3.5), "o"
)
FLAT_LORA = Look("flat", Tone("#2f6fde", "#7aa5fa"), (Tone("#84adf2", "#c3d6ff"), Tone("#173f8f", "#4c7de0")), (), "D")
THIRD = Look("third", Tone("#1f534b", "#8ae3d8"), (), (10, 3, 2, 3), "^")
FOURTH = Look("fourth", Tone("#a93cb1", "#d03fc6"), (), (4, 2), "P")
LOOKS = (BASE, LORA, FLAT_LORA, THIRD, FOURTH)
OWN_LOOKS = {
    name: look for name, row in METHODS.items() for look in LOOKS if look.name == row.look and look is not THIRD
}
"""The look of each `--method` that has its own; the others have THIRD. An arm of a comparison that is one of these as
it comes has its name for a key.
"""

TONES = {"paper": PAPER, "ink": INK, "faint": FAINT, "rule": RULE}
TONES |= {name: tone for look in LOOKS for name, tone in look.tones.items()}
"""Every colour of a chart by its CSS variable."""
