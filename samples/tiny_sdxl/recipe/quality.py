"""The numbers and the picture by which the base is judged: VAE fidelity, name retrieval, styles, a contact sheet."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from flatlora_diffusion.evaluation.judge import (
    STYLE_PROMPTS,
    Judge,
    load_judge,
    rank_names,
    rank_of,
    style_probabilities,
)
from flatlora_diffusion.ground.seeds import generator
from samples.tiny_sdxl.recipe.judge import STYLES, Renders, split_held_out
from samples.tiny_sdxl.recipe.vae import psnr

if TYPE_CHECKING:  # importing it at run time needs the `recipe` extra, which nothing here does
    from samples.tiny_sdxl.recipe.icons import Concept

PROMPT = "a flat icon of {}"
CANDIDATES = 100  # names that the judge chooses from: the right one and 99 seeded others
STEPS = 25
SIZE = 64
BATCH = 20
IS_3D = STYLES.index("fluent-3d")


def measure_quality(
    concepts: Sequence[Concept],
    chosen: Sequence[Concept],
    renders: Renders,
    pipeline_folder: Path,
    judge_folder: Path,
    guidance: float = 5.0,
) -> tuple[dict[str, Any], Image.Image]:
    """The report of the saved pipeline and the contact sheet of every second concept of `chosen`.

    `renders` are those of all `concepts`; `chosen` are the concepts that the pipeline was trained on.
    """
    judge = load_judge(judge_folder)
    vae = AutoencoderKL.from_pretrained(pipeline_folder, subfolder="vae").float().eval()
    images_3d = renders.images[(renders.styles == IS_3D).numpy()]
    icons = generate_icons(pipeline_folder, chosen, guidance)
    report = {
        "vae": {"psnr_db": round(psnr(vae, images_3d), 2), "images_3d": len(images_3d)},
        "generated": {
            "prompt": PROMPT.format("NAME"),
            "steps": STEPS,
            "guidance": guidance,
            "size": SIZE,
            **retrieval(judge, icons, chosen),
            "styles": style_shares(judge, icons),
        },
        "real": real_rates(judge, concepts, chosen, renders),
        "held_out": held_out_rates(judge, concepts, renders),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "device": f"CPU, {platform.machine()}",
    }
    return report, contact_sheet(icons[::2], [concept.name for concept in chosen[::2]])


def generate_icons(pipeline_folder: Path, concepts: Sequence[Concept], guidance: float) -> list[Image.Image]:
    """One 64-pixel image per concept; its noise depends on the concept alone, not on its neighbours in the batch."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_folder, add_watermarker=False).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    icons: list[Image.Image] = []
    for start in tqdm(range(0, len(concepts), BATCH), desc="generate", unit="batch"):
        batch = concepts[start : start + BATCH]
        icons += pipeline(
            prompt=[PROMPT.format(concept.name) for concept in batch],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            height=SIZE,
            width=SIZE,
            original_size=(SIZE, SIZE),
            target_size=(SIZE, SIZE),
            generator=[generator("cpu", 0, "quality", concept.hexcode) for concept in batch],
        ).images
    return icons


def retrieval(judge: Judge, icons: list[Image.Image], concepts: Sequence[Concept]) -> dict[str, Any]:
    """How often the right name is first and among the first five, and what the judge took each missed icon for."""
    names = [concept.name for concept in concepts]
    candidates = draw_candidates(concepts)
    scores = rank_names(judge, icons, names).gather(1, candidates)
    ranks = _ranks(scores)
    taken_for = candidates.gather(1, scores.argmax(dim=1, keepdim=True)).flatten().tolist()
    missed = {names[i]: names[taken_for[i]] for i in range(len(names)) if ranks[i] > 0}
    return {
        "concepts": len(names),
        "candidates": candidates.shape[1],
        "first": _share(ranks == 0),
        "first_five": _share(ranks < 5),
        "taken_for": missed,
    }


def style_shares(judge: Judge, icons: list[Image.Image]) -> dict[str, float]:
    """The share of the icons that the judge takes for each style; sums to 1."""
    found = style_probabilities(judge, icons).argmax(dim=1).bincount(minlength=len(STYLE_PROMPTS))
    return {style: int(count) / len(icons) for style, count in zip(STYLES, found, strict=True)}


def real_rates(
    judge: Judge, concepts: Sequence[Concept], chosen: Sequence[Concept], renders: Renders
) -> dict[str, float]:
    """The judge's rate on real renders of the concepts that were generated, among the same candidates; the ceiling."""
    place = torch.full((len(concepts),), -1)
    codes = {concept.hexcode: index for index, concept in enumerate(concepts)}
    place[[codes[concept.hexcode] for concept in chosen]] = torch.arange(len(chosen))
    own = renders.take((place[renders.concepts] >= 0).nonzero().flatten())
    owners = place[own.concepts]
    scores = rank_names(judge, _pixels(own), [concept.name for concept in chosen])
    is_first = _ranks(scores.gather(1, draw_candidates(chosen)[owners])) == 0
    is_3d = own.styles == IS_3D
    return {"flat": _share(is_first[~is_3d]), "3d": _share(is_first[is_3d])}


def held_out_rates(judge: Judge, concepts: Sequence[Concept], renders: Renders) -> dict[str, float]:
    """The judge on renders it was not trained on: the right name first among 100 of all, the right style among 4."""
    held = renders.take(split_held_out(renders)[1])
    scores = rank_names(judge, _pixels(held), [concept.name for concept in concepts])
    is_first = _ranks(scores.gather(1, draw_candidates(concepts)[held.concepts])) == 0
    is_style = style_probabilities(judge, _pixels(held)).argmax(dim=1) == held.styles
    return {"images": len(held.concepts), "names": _share(is_first), "styles": _share(is_style)}


def draw_candidates(concepts: Sequence[Concept], count: int = CANDIDATES) -> Tensor:
    """For each concept the indices of the names to choose from, (N, count): its own first, then seeded others."""
    rows = []
    for index, concept in enumerate(concepts):
        order = torch.randperm(len(concepts), generator=generator("cpu", 0, "candidates", concept.hexcode))
        rows.append(torch.cat([torch.tensor([index]), order[order != index][: count - 1]]))
    return torch.stack(rows)


def write_report(report: dict[str, Any], sheet: Image.Image, folder: Path) -> None:
    """`quality.json` and `contact_sheet.png` in `folder`."""
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (folder / "quality.json").write_text(text, encoding="utf-8")
    sheet.save(folder / "contact_sheet.png", optimize=True)


def quality_table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    made, real, held = report["generated"], report["real"], report["held_out"]
    among = f"right name first among {made['candidates']}"
    styles = ", ".join(f"{style} {share:.0%}" for style, share in made["styles"].items())
    rows = [
        (f"VAE PSNR on {report['vae']['images_3d']} 3D icons it never saw", f"{report['vae']['psnr_db']:.1f} dB"),
        (f"{among}: {made['concepts']} generated icons, one per concept", f"{made['first']:.1%}"),
        (f"{among}: real flat renders of the same concepts", f"{real['flat']:.1%}"),
        (f"{among}: real 3D renders of the same concepts", f"{real['3d']:.1%}"),
        ("right name among the first five: generated icons", f"{made['first_five']:.1%}"),
        ("style of the generated icons, as the judge sees it", styles),
        (f"judge: {among}, {held['images']} renders it never saw", f"{held['names']:.1%}"),
        ("judge: right style among 4, the same renders", f"{held['styles']:.1%}"),
    ]
    return "\n".join(["| what | value |", "| --- | --- |", *(f"| {what} | {value} |" for what, value in rows)])


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


def _ranks(scores: Tensor) -> Tensor:
    """The rank of the right name, which stands in column 0."""
    return rank_of(scores, torch.zeros(len(scores), dtype=torch.long))


def _share(is_true: Tensor) -> float:
    return round(float(is_true.float().mean()), 4)
