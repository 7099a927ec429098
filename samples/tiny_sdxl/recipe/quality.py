"""The numbers and the picture by which the base is judged: names found, styles, VAE fidelity, size, a contact sheet.

Each name rate stands beside the same judge's rate on real renders and on renders that it never saw.
"""

from __future__ import annotations

import json
import platform
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flatlora_diffusion.evaluation.judge import Images, Judge, rank_names, rank_of, style_probabilities
from flatlora_diffusion.storage.rng import generator
from samples.tiny_sdxl.recipe.captions import STYLE_WORDS
from samples.tiny_sdxl.recipe.drawing import STEPS, size_of
from samples.tiny_sdxl.recipe.icons import FLAT_STYLES, SIZE, Concept
from samples.tiny_sdxl.recipe.judge import STYLES, Renders, split_held_out
from samples.tiny_sdxl.recipe.vae import psnr, reconstructed

PROMPT, GUIDANCE = "a flat icon of {}", 5.0  # of all figures since the first base
STYLED_PROMPT, STYLED_GUIDANCE = "a flat icon of {}, in the style of WORD", 4.0  # what is recommended
CANDIDATES = 100  # names that the judge chooses from: the right one and 99 seeded others
IS_3D = STYLES.index("fluent-3d")

Ranker = Callable[[Images, Sequence[Concept]], Tensor]
"""A score of the name of each concept for each image, (B, len(concepts)): what a judge of names is."""


@dataclass(frozen=True)
class Drawn:
    """What the base drew, an icon per concept: `everything` it was trained on, and the `known` ones in each style.

    `guidance` is that of the `plain` icons, `styled_guidance` that of the others.
    """

    everything: Sequence[Concept]
    known: Sequence[Concept]
    plain: Sequence[Image.Image]
    styled: Mapping[str, Sequence[Image.Image]]
    guidance: float = GUIDANCE
    styled_guidance: float = STYLED_GUIDANCE

    @property
    def plain_known(self) -> list[Image.Image]:
        """Of `plain` those of the `known` concepts, in their order."""
        by_code = {concept.hexcode: icon for concept, icon in zip(self.everything, self.plain, strict=True)}
        return [by_code[concept.hexcode] for concept in self.known]


Artist = Callable[[Sequence[Concept], str, float], list[Image.Image]]
"""Draws an icon of each concept by a prompt with the place of its name, and a guidance."""


def draw(
    artist: Artist,
    everything: Sequence[Concept],
    known: Sequence[Concept],
    guidance: float = GUIDANCE,
    styled_guidance: float = STYLED_GUIDANCE,
) -> Drawn:
    """All that is measured."""
    styled = {
        style: artist(known, STYLED_PROMPT.replace("WORD", STYLE_WORDS[style]), styled_guidance)
        for style in FLAT_STYLES
    }
    return Drawn(everything, known, artist(everything, PROMPT, guidance), styled, guidance, styled_guidance)


def measure_quality(
    concepts: Sequence[Concept],
    drawn: Drawn,
    renders: Renders,
    base: Path,
    vae: AutoencoderKL | AutoencoderKLFlux2,
    judges: tuple[Judge, Ranker | None],
) -> dict[str, Any]:
    """The report of the saved pipeline `base` with this `vae`; `renders` are those of all `concepts`.

    The second of the `judges` tells names only.
    """
    judge, second = judges
    images_3d = renders.images[(renders.styles == IS_3D).numpy()]
    rankers: dict[str, Ranker] = {"judge": partial(rank_by_clip, judge)}
    if second is not None:
        rankers["second_judge"] = second
    return {
        "megabytes": round(size_of(base), 1),
        "vae": {"psnr_db": round(psnr(vae, images_3d), 2), "images_3d": len(images_3d)},
        "settings": {
            "prompt": PROMPT.format("NAME"),
            "guidance": drawn.guidance,
            "styled_prompt": STYLED_PROMPT.format("NAME"),
            "styled_guidance": drawn.styled_guidance,
            "steps": STEPS,
            "size": SIZE,
            "candidates": CANDIDATES,
            "known": len(drawn.known),
            "everything": len(drawn.everything),
            "held_out": len(split_held_out(renders)[1]),
        },
        "names": {name: name_rates(rank, concepts, drawn, renders) for name, rank in rankers.items()},
        "styles": style_rates(judge, drawn, renders)
        | {"real": real_styles(judge, concepts, drawn.known, renders, vae)},
        "taken_for": taken_for(rankers["judge"], drawn.plain_known, drawn.known),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "device": f"CPU, {platform.machine()}",
    }


def rank_by_clip(judge: Judge, images: Images, concepts: Sequence[Concept]) -> Tensor:
    """The first judge as a `Ranker`."""
    return rank_names(judge, images, [concept.name for concept in concepts])


def name_rates(rank: Ranker, concepts: Sequence[Concept], drawn: Drawn, renders: Renders) -> dict[str, Any]:
    """How often the right name is first: of generated icons, of real renders of the same things, of held-out ones."""
    found = ranks(rank, drawn.plain_known, drawn.known)
    held = renders.take(split_held_out(renders)[1])
    return {
        "known": _share(found == 0),
        "known_first_five": _share(found < 5),
        "everything": _share(ranks(rank, drawn.plain, drawn.everything) == 0),
        "styled": {style: _share(ranks(rank, icons, drawn.known) == 0) for style, icons in drawn.styled.items()},
        "real_known": real_rates(rank, concepts, drawn.known, renders),
        "real_everything": real_rates(rank, concepts, drawn.everything, renders),
        "held_out": _share(ranks(rank, _pixels(held), concepts, held.concepts) == 0),
    }


def style_rates(judge: Judge, drawn: Drawn, renders: Renders) -> dict[str, Any]:
    """What styles the judge sees: without a style word, with each set's, and its own rate on held-out renders."""
    held = renders.take(split_held_out(renders)[1])
    is_right = style_probabilities(judge, _pixels(held)).argmax(dim=1) == held.styles
    return {
        "plain": style_shares(judge, drawn.plain_known),
        "styled": {style: style_shares(judge, icons) for style, icons in drawn.styled.items()},
        "held_out": _share(is_right),
    }


def real_styles(
    judge: Judge,
    concepts: Sequence[Concept],
    chosen: Sequence[Concept],
    renders: Renders,
    vae: AutoencoderKL | AutoencoderKLFlux2,
) -> dict[str, dict[str, float]]:
    """How often the judge sees the style of real renders of `chosen`, as they are and after the VAE: the ceiling."""
    own, _ = _renders_of(concepts, chosen, renders)
    found = {}
    for place, style in enumerate(STYLES):
        some = own.take((own.styles == place).nonzero().flatten())
        seen = {"as_is": _pixels(some), "after_vae": (reconstructed(vae, some.images) + 1) / 2}
        found[style] = {
            name: _share(style_probabilities(judge, pixels).argmax(dim=1) == place) for name, pixels in seen.items()
        }
    return found


def ranks(rank: Ranker, images: Images, concepts: Sequence[Concept], owners: Tensor | None = None) -> Tensor:
    """The rank of the right name of each image among its candidates, (B,); 0 is first.

    `owners` has the concept of each image by its place; without it there is an image of each concept.
    """
    candidates = draw_candidates(concepts)
    scores = rank(images, concepts).gather(1, candidates if owners is None else candidates[owners])
    return rank_of(scores, torch.zeros(len(scores), dtype=torch.long))  # the right name stands in column 0


def taken_for(rank: Ranker, icons: Images, concepts: Sequence[Concept]) -> dict[str, str]:
    """What the judge took each missed icon for."""
    candidates = draw_candidates(concepts)
    first = rank(icons, concepts).gather(1, candidates).argmax(dim=1, keepdim=True)
    found = candidates.gather(1, first).flatten().tolist()
    return {
        one.name: concepts[place].name for one, place in zip(concepts, found, strict=True) if concepts[place] != one
    }


def style_shares(judge: Judge, icons: Sequence[Image.Image]) -> dict[str, float]:
    """The share of the icons that the judge takes for each style; sums to 1."""
    found = style_probabilities(judge, icons).argmax(dim=1).bincount(minlength=len(STYLES))
    return {style: int(count) / len(icons) for style, count in zip(STYLES, found, strict=True)}


def real_rates(
    rank: Ranker, concepts: Sequence[Concept], chosen: Sequence[Concept], renders: Renders
) -> dict[str, float]:
    """A judge's rate on real renders of the concepts that were generated, among the same candidates; the ceiling."""
    own, owners = _renders_of(concepts, chosen, renders)
    is_first = ranks(rank, _pixels(own), chosen, owners) == 0
    is_3d = own.styles == IS_3D
    return {"flat": _share(is_first[~is_3d]), "3d": _share(is_first[is_3d])}


def _renders_of(concepts: Sequence[Concept], chosen: Sequence[Concept], renders: Renders) -> tuple[Renders, Tensor]:
    """The renders of the `chosen` among all `concepts`, and the place of each one's concept among the chosen."""
    place = torch.full((len(concepts),), -1)
    codes = {concept.hexcode: index for index, concept in enumerate(concepts)}
    place[[codes[concept.hexcode] for concept in chosen]] = torch.arange(len(chosen))
    own = renders.take((place[renders.concepts] >= 0).nonzero().flatten())
    return own, place[own.concepts]


def draw_candidates(concepts: Sequence[Concept], count: int = CANDIDATES) -> Tensor:
    """For each concept the indices of the names to choose from, (N, count): its own first, then seeded others."""
    rows = []
    for index, concept in enumerate(concepts):
        order = torch.randperm(len(concepts), generator=generator("cpu", 0, "candidates", concept.hexcode))
        rows.append(torch.cat([torch.tensor([index]), order[order != index][: count - 1]]))
    return torch.stack(rows)


def write_report(report: dict[str, Any], drawn: Drawn, folder: Path) -> None:
    """`quality.json` and `contact_sheet.png`, of every second known concept, in `folder`."""
    folder.mkdir(exist_ok=True)
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "quality.json").write_text(text, encoding="utf-8")
    sheet = contact_sheet(drawn.plain_known[::2], [concept.name for concept in drawn.known[::2]])
    sheet.save(folder / "contact_sheet.png", optimize=True)


def quality_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, with a column for each judge of names."""
    judges, styles, settings = list(report["names"].values()), report["styles"], report["settings"]
    known, everything = f"the {settings['known']} best known things", f"all {settings['everything']} things"
    plain = f"`{settings['prompt']}`, guidance {settings['guidance']:g}"
    words = {style: f"`{settings['styled_prompt'].replace('WORD', STYLE_WORDS[style])}`" for style in styles["styled"]}
    by_word: Mapping[str, Mapping[str, float]] = styles["styled"]
    styled = f"guidance {settings['styled_guidance']:g}"

    def rates(what: str, *keys: str) -> tuple[str, ...]:
        found = []
        for value in judges:
            for key in keys:
                value = value[key]
            found.append(f"{value:.1%}")
        return (what, *found)

    rows: list[tuple[str, ...]] = [
        (f"**right name first among {settings['candidates']}**",),
        rates(f"generated, {known}: {plain}", "known"),
        rates("the same, right name among the first five", "known_first_five"),
        rates(f"generated, {everything}: {plain}", "everything"),
        *(rates(f"generated, {known}: {text}, {styled}", "styled", style) for style, text in words.items()),
        rates(f"real flat renders of {known}", "real_known", "flat"),
        rates(f"real flat renders of {everything}", "real_everything", "flat"),
        rates(f"real 3D renders of {known}", "real_known", "3d"),
        rates(f"the judge itself: {settings['held_out']} renders it never saw", "held_out"),
        ("**style, as the judge sees it**",),
        (f"no style word: {plain}", _shares(styles["plain"])),
        *((f"{text}, {styled}: {style}", _shares(by_word[style])) for style, text in words.items()),
        (
            "mean of the style words: the right set",
            f"{statistics.fmean(shares[style] for style, shares in by_word.items()):.1%}",
        ),
        (
            "mean of the style words: 3D, which it never saw",
            f"{statistics.fmean(s['fluent-3d'] for s in by_word.values()):.1%}",
        ),
        *(
            (f"real {style} renders of {known}; after the VAE", f"{rate['as_is']:.1%}; {rate['after_vae']:.1%}")
            for style, rate in styles["real"].items()
        ),
        ("the judge itself: right style among 4, renders it never saw", f"{styles['held_out']:.1%}"),
        ("**the base**",),
        (f"VAE PSNR on {report['vae']['images_3d']} 3D icons it never saw", f"{report['vae']['psnr_db']:.1f} dB"),
        ("size without judge", f"{report['megabytes']:.1f} MB"),
    ]
    heads = ["what", *(name.replace("_", " ") for name in report["names"])]
    lines = [[*row, *[""] * (len(heads) - len(row))] for row in (heads, ["---"] * len(heads), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def contact_sheet(icons: Sequence[Image.Image], names: Sequence[str], columns: int = 10) -> Image.Image:
    """A grid of the icons at twice their size, with the names under them."""
    side, label, gap = 2 * SIZE, 30, 8
    cell_width, cell_height = side + gap, side + label + gap
    rows = -(-len(icons) // columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for index, (icon, name) in enumerate(zip(icons, names, strict=True)):
        left, top = gap + index % columns * cell_width, gap + index // columns * cell_height
        sheet.paste(icon.resize((side, side), Image.Resampling.LANCZOS), (left, top))
        lines = textwrap.wrap(name, width=19, max_lines=2, placeholder="…")
        middle = (left + side / 2, top + side)
        draw.multiline_text(middle, "\n".join(lines), "black", font, anchor="ma", align="center", spacing=2)
    return sheet


def _pixels(renders: Renders) -> Tensor:
    """(N, 3, 64, 64) in [0, 1], as the judge takes tensors."""
    return torch.from_numpy(np.ascontiguousarray(renders.images)).permute(0, 3, 1, 2).float() / 255


def _share(is_true: Tensor) -> float:
    return round(float(is_true.float().mean()), 4)


def _shares(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{style} {share:.0%}" for style, share in shares.items())
