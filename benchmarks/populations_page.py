"""docs/generalization.md: the tables of `populations`, made from its JSON.

    python -m benchmarks.populations_page

A subject's loss less LoRA's, by population, with 95 % intervals over groups of seeds and icons; the same where both
forget as much, each at the strength that the tuning list of flat icons gives; and Holm's correction for each column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from benchmarks.population_icons import TUNING_FLAT
from benchmarks.population_uses import ALONE, ALONE_IN_BOTH, BESIDE, BITS, USES
from flatlora_diffusion.evaluation.crossed_statistics import CrossedDifference, crossed_difference
from flatlora_diffusion.evaluation.paired_statistics import CONFIDENCE

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent / "docs" / "generalization.md"
USES_FILE = FOLDER / "population_uses.json"
STYLES = {
    "populations": "3D icons",
    "populations_second_style": "Icons with outlines",
    "populations_klein": "3D icons on a FLUX.2 klein",
}
POPULATIONS = ("known 200", "known 615", "unknown")
FORGETTING = "flat"
REFERENCE, AVERAGE = "lora", "average of 3"
OF_OTHER_SETTINGS = ("demo: LoRA", "10 images: LoRA")  # what only other subjects of theirs are compared with
PAIRS = (
    ("average of 3 Flat-LoRAs 0.4", AVERAGE),
    ("average of 3 SAMs 0.125", AVERAGE),
    (AVERAGE, "rank 12"),
    (AVERAGE, "3 x batch"),
    (AVERAGE, "3 x batch, half the rate"),
    (AVERAGE, "3 x steps, third of the rate"),
    (AVERAGE, "3 x steps, cosine rate"),
)
MINUS = "\N{MINUS SIGN}"

Losses = np.ndarray
"""(groups, icons, draws), in 10⁻⁵, less the base's."""


@dataclass(frozen=True)
class Study:
    """The JSON of one style: losses by (subject, member, strength) and list, with the groups that each has."""

    data: Mapping[str, Any]
    losses: Mapping[tuple[str, int, float], Mapping[int, Mapping[str, np.ndarray]]]

    @classmethod
    def read(cls, file: Path) -> Study:
        data = json.loads(file.read_text(encoding="utf-8"))
        losses: dict[tuple[str, int, float], dict[int, dict[str, np.ndarray]]] = {}
        for row in data["rows"]:
            key = row["subject"], row["member"], row["strength"]
            losses.setdefault(key, {})[row["group"]] = {name: _numbers(text) for name, text in row["losses"].items()}
        return cls(data, losses)

    def groups(self, subject: str) -> list[int]:
        """The groups in which the subject's first member was measured at strength 1."""
        return sorted(self.losses.get((subject, 0, 1.0), {}))

    def table(self, subject: str, name: str, groups: Sequence[int], strength: float = 1.0, member: int = 0) -> Losses:
        """Of a list, the mean over draws: (groups, icons). Between measured strengths each icon's loss is
        interpolated by the polynomial through the base at 0 and every strength that was measured.
        """
        measured = sorted(at for one, of, at in self.losses if (one, of) == (subject, member))
        by_strength = {
            at: np.stack([self.losses[subject, member, at][group][name].mean(axis=-1) for group in groups])
            for at in measured
            if all(group in self.losses[subject, member, at] for group in groups)
        }
        if strength in by_strength:
            return by_strength[strength]
        knots = [0.0, *by_strength]
        values = [np.zeros_like(by_strength[1.0]), *by_strength.values()]
        total = np.zeros_like(values[0])
        for place, (knot, value) in enumerate(zip(knots, values, strict=True)):
            others = [other for index, other in enumerate(knots) if index != place]
            total += value * np.prod([(strength - other) / (knot - other) for other in others])
        return total

    def reference(self, subject: str, name: str, groups: Sequence[int], strength: float = 1.0) -> np.ndarray:
        """What the subject is compared with, on a list: the mean of the runs that have its seeds, (groups, icons)."""
        about = self.data["subjects"][subject]
        measured = [member for member in about["members"] if (about["reference"], member, 1.0) in self.losses]
        parts = [self.table(about["reference"], name, groups, strength, member) for member in measured]
        return np.asarray(np.mean(parts, axis=0))

    def strengths(self, subject: str) -> list[float]:
        return sorted(at for one, of, at in self.losses if (one, of) == (subject, 0))


class Comparison(NamedTuple):
    """A subject less LoRA in one population: at strength 1, and where both forget as much."""

    plain: CrossedDifference
    equal: CrossedDifference | None


class Strengths(NamedTuple):
    """The strengths at which a subject and LoRA forget as much of the tuning list."""

    subject: float
    reference: float


def equal_forgetting(study: Study, subject: str, groups: Sequence[int]) -> Strengths | None:
    """Whichever forgets more at strength 1 is weakened until both forget as much; None where that is not measured."""

    def forgets(is_reference: bool, strength: float) -> float:
        table = study.reference if is_reference else study.table
        return float(table(subject, TUNING_FLAT, groups, strength).mean())

    own, reference = forgets(False, 1.0), forgets(True, 1.0)
    is_weaker, target = own <= reference, min(own, reference)
    if len(study.strengths(study.data["subjects"][subject]["reference"] if is_weaker else subject)) < 2:
        return None
    grid = np.linspace(0.3, 1.0, 141)
    values = [forgets(is_weaker, strength) - target for strength in grid]
    places = [place for place in range(len(grid) - 1) if values[place] <= 0 < values[place + 1]]
    if not places:
        return None
    left, right = grid[places[-1]], grid[places[-1] + 1]
    found = float(optimize.brentq(lambda strength: forgets(is_weaker, strength) - target, left, right))
    return Strengths(1.0, found) if is_weaker else Strengths(found, 1.0)


def compared(study: Study, subject: str, groups: Sequence[int]) -> tuple[dict[str, Comparison], Strengths | None]:
    """The subject less LoRA in every population and in forgetting."""
    strengths = equal_forgetting(study, subject, groups)
    found = {}
    for name in (*POPULATIONS, FORGETTING):
        plain = study.table(subject, name, groups) - study.reference(subject, name, groups)
        equal = None
        if strengths is not None:
            own = study.table(subject, name, groups, strengths.subject)
            equal = crossed_difference((own - study.reference(subject, name, groups, strengths.reference)).tolist())
        found[name] = Comparison(crossed_difference(plain.tolist()), equal)
    return found, strengths


def less_another(study: Study, subject: str, other: str, groups: Sequence[int]) -> dict[str, CrossedDifference]:
    """One subject less another at strength 1, in every population and in forgetting."""
    tables = {
        name: study.table(subject, name, groups) - study.table(other, name, groups)
        for name in (*POPULATIONS, FORGETTING)
    }
    return {name: crossed_difference(table.tolist()) for name, table in tables.items()}


def style_section(study: Study, title: str) -> str:
    """The tables of one style."""
    base = study.groups(REFERENCE)
    subjects = [name for name in study.data["subjects"] if name not in (REFERENCE, *OF_OTHER_SETTINGS)]
    subjects = [name for name in subjects if len(study.groups(name)) >= 2]
    rows, families = {}, {}
    for subject in subjects:
        reference = study.data["subjects"][subject]["reference"]
        groups = [group for group in study.groups(subject) if group in base and group in study.groups(reference)]
        rows[subject] = groups, *compared(study, subject, groups)
    for name in POPULATIONS:
        for kind in ("plain", "equal"):
            parts = {subject: getattr(row[1][name], kind) for subject, row in rows.items()}
            known = {subject: part for subject, part in parts.items() if part is not None and part.p is not None}
            held = holm([part.p or 0.0 for part in known.values()])
            families[name, kind] = {subject for subject, is_sure in zip(known, held, strict=True) if is_sure}
    lists = ", ".join(f"{name} {len(study.data['lists'][name])}" for name in (*POPULATIONS, FORGETTING))
    lora = {
        name: _interval(crossed_difference(study.table(REFERENCE, name, base).tolist()), False)
        for name in (*POPULATIONS, FORGETTING)
    }
    head = ["", "passes", "groups", *POPULATIONS, "forgets"]
    lines = [f"## {title}", "", f"Icons: {lists}. LoRA less the base, {len(base)} groups:", ""]
    lines += table(["", *POPULATIONS, "forgets"], [["LoRA", *lora.values()]])
    lines += ["", "**At strength 1**, less LoRA:", ""]
    lines += table(
        head,
        [
            [
                shown(study, subject),
                f"{study.data['subjects'][subject]['passes']:g}",
                str(len(groups)),
                *(_interval(found[name].plain, subject in families[name, "plain"]) for name in POPULATIONS),
                _interval(found[FORGETTING].plain, False),
            ]
            for subject, (groups, found, _) in rows.items()
        ],
    )
    lines += ["", "**Where both forget as much**, less LoRA:", ""]
    lines += table(
        ["", "strength", "LoRA's", *POPULATIONS, "forgets"],
        [
            [
                shown(study, subject),
                f"{strengths.subject:.2f}",
                f"{strengths.reference:.2f}",
                *(_interval(found[name].equal, subject in families[name, "equal"]) for name in POPULATIONS),
                _interval(found[FORGETTING].equal, False),
            ]
            for subject, (groups, found, strengths) in rows.items()
            if strengths is not None
        ],
    )
    pairs = [(one, other) for one, other in PAIRS if one in rows and other in rows]
    if pairs:
        lines += ["", "**One less another**, both at strength 1:", ""]
        lines += table(
            ["", "less", "groups", *POPULATIONS, "forgets"],
            [
                [
                    one,
                    other,
                    str(len(both)),
                    *(_interval(part, False) for part in less_another(study, one, other, both).values()),
                ]
                for one, other in pairs
                if (both := [group for group in rows[one][0] if group in rows[other][0]])
            ],
        )
    return "\n".join(lines)


def shown(study: Study, subject: str) -> str:
    """The subject's name, with what it is compared with where that is not LoRA."""
    reference = study.data["subjects"][subject]["reference"]
    return subject if reference == REFERENCE else f"{subject}, less {reference}"


def uses_section(data: Mapping[str, Any]) -> str:
    """The table of `population_uses`: the price of each use of LoRA, and of the others less LoRA's."""
    subjects = list(dict.fromkeys(row["subject"] for row in data["rows"]))
    groups = sorted({row["group"] for row in data["rows"]})
    known = {(row["subject"], row["group"]): row["losses"] for row in data["rows"]}

    def price(subject: str, use: str) -> np.ndarray:
        without = ALONE_IN_BOTH if use == BESIDE else ALONE
        return np.array([_less(known[subject, group][use], known[subject, group][without]) for group in groups])

    def of_base(use: str) -> str:
        if use not in BITS:
            return ""
        rise = [_less(data["base"][str(group)][use], data["base"][str(group)][ALONE]) for group in groups]
        return _interval(crossed_difference(rise), False)

    rows = []
    for use in USES:
        first, *others = subjects
        less = [crossed_difference((price(other, use) - price(first, use)).tolist()) for other in others]
        held = holm([part.p or 0.0 for part in less])
        told = [_interval(part, is_sure) for part, is_sure in zip(less, held, strict=True)]
        rows.append([use, of_base(use), _interval(crossed_difference(price(first, use).tolist()), False), *told])
    head = [
        "",
        "the base's rise",
        f"{subjects[0]}: rise",
        *(f"{other}, less {subjects[0]}'s" for other in subjects[1:]),
    ]
    about = f'Rise of the loss on "{data["list"]}" by what is done to a LoRA, {len(groups)} groups:'
    return "\n".join(["## In use", "", about, "", *table(head, rows)])


def holm(p_values: Sequence[float], level: float = 1 - CONFIDENCE) -> list[bool]:
    """Return which tests of a family reject at `level`, by Holm's step-down procedure (Scand. J. Stat. 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    rejected = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > level / (len(p_values) - rank):
            break
        rejected[index] = True
    return rejected


def _less(minuend: str, subtrahend: str) -> list[float]:
    """The differences of two losses, icon by icon."""
    values: list[float] = (_numbers(minuend) - _numbers(subtrahend)).ravel().tolist()
    return values


def _numbers(text: str) -> np.ndarray:
    return np.array([[float(draw) for draw in icon.split(",")] for icon in text.split(" ")])


def _interval(found: CrossedDifference | None, is_sure: bool) -> str:
    if found is None:
        return ""
    mean = f"{found.mean:+.0f}".replace("-", MINUS)
    said = mean if found.margin is None else f"{mean} ± {found.margin:.0f}"
    return f"**{said}**" if is_sure else said


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def main() -> None:
    studies = {
        title: Study.read(file) for name, title in STYLES.items() if (file := FOLDER / f"{name}.json").is_file()
    }
    parts = [style_section(study, title) for title, study in studies.items() if len(study.groups(REFERENCE)) >= 2]
    if USES_FILE.is_file():
        parts.append(uses_section(json.loads(USES_FILE.read_text(encoding="utf-8"))))
    start, end = "<!-- tables -->", "<!-- end of tables -->"
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(start)[0], text.split(end)[1]
    tables = "\n\n".join(parts)
    PAGE.write_text(f"{before}{start}\n\n{tables}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
