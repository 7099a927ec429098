"""The report on the base: what it draws is drawn once, which names and styles it counts, what its table says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from flatlora_diffusion.config import SAMPLES
from flatlora_diffusion.evaluation.judge import Images, load_judge, style_probabilities
from samples.tiny_sdxl.recipe import drawing
from samples.tiny_sdxl.recipe.captions import STYLE_WORDS
from samples.tiny_sdxl.recipe.drawing import draw_icons, size_of
from samples.tiny_sdxl.recipe.icons import FLAT_STYLES, Concept
from samples.tiny_sdxl.recipe.judge import STYLES, Renders
from samples.tiny_sdxl.recipe.quality import Drawn, draw, measure_quality, quality_table, ranks, write_report

TINY = SAMPLES / "tiny_sdxl"
CONCEPTS = [
    Concept(code, name, (), 3, "animal-mammal", place, 1.0, {}, None)
    for place, (code, name) in enumerate([("1F98A", "fox"), ("1F41C", "ant"), ("1F431", "cat face")])
]


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "STEPS", 1)


def first_is_right(images: Images, concepts: Sequence[Concept]) -> Tensor:
    """A judge that takes every image for the first concept."""
    return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), len(concepts)).float()


@pytest.mark.usefixtures("one_step")
def test_an_icon_is_drawn_once_and_depends_on_its_concept_alone(tmp_path: Path) -> None:
    together = draw_icons(TINY, CONCEPTS, "an icon of {}", 5.0, tmp_path / "one")
    (alone,) = draw_icons(TINY, CONCEPTS[1:2], "an icon of {}", 5.0, tmp_path / "two")
    difference = torch.tensor(list(together[1].tobytes())).int() - torch.tensor(list(alone.tobytes())).int()
    assert difference.abs().max() <= 1, "by rounding only"
    kept = tmp_path / "one"
    again = draw_icons(
        TINY, [CONCEPTS[2], CONCEPTS[0]], "an icon of {}", 5.0, kept, lambda _: pytest.fail("drawn again")
    )
    assert [icon.tobytes() for icon in again] == [together[2].tobytes(), together[0].tobytes()]


@pytest.mark.usefixtures("one_step")
def test_prompt_guidance_and_weights_have_icons_of_their_own(tmp_path: Path) -> None:
    for prompt, guidance in (("an icon of {}", 5.0), ("an icon of {}", 4.0), ("a flat icon of {}", 5.0)):
        draw_icons(TINY, CONCEPTS[:1], prompt, guidance, tmp_path)
    assert len(list(tmp_path.glob("*/1F98A.png"))) == 3


def test_the_known_things_are_a_part_of_all_and_are_drawn_in_each_sets_own_words() -> None:
    asked: list[tuple[str, float, int]] = []

    def artist(concepts: Sequence[Concept], prompt: str, guidance: float) -> list[Image.Image]:
        asked.append((prompt, guidance, len(concepts)))
        return [Image.new("L", (1, 1), concept.order) for concept in concepts]

    drawn = draw(artist, CONCEPTS, CONCEPTS[1:], styled_guidance=3.5)
    styled = [(f"a flat icon of {{}}, in the style of {STYLE_WORDS[style]}", 3.5, 2) for style in FLAT_STYLES]
    assert sorted(asked) == sorted([*styled, ("a flat icon of {}", 5.0, 3)])
    assert [icon.tobytes() for icon in drawn.plain_known] == [icon.tobytes() for icon in drawn.plain[1:]]
    assert (drawn.guidance, drawn.styled_guidance) == (5.0, 3.5)


def test_the_right_name_is_looked_for_among_its_candidates_only() -> None:
    many = [replace(CONCEPTS[0], hexcode=f"{code:X}", name=str(code)) for code in range(150)]
    worst_first = torch.arange(150).float().expand(150, -1)  # the later a name, the better it scores
    found = ranks(lambda *_: worst_first, [], many)
    assert found[149] == 0
    assert found[0] == 99, "the other 99 candidates, not all 149"
    held = ranks(lambda *_: worst_first[:2], [], many, torch.tensor([149, 0]))
    assert held.tolist() == [0, 99]


def test_the_table_has_a_column_for_each_judge_and_the_styles_of_each_word(tmp_path: Path) -> None:
    grey = [Image.new("RGB", (64, 64), (shade, shade, shade)) for shade in (60, 120, 180)]
    drawn = Drawn(CONCEPTS, CONCEPTS[:2], grey, {style: grey[:2] for style in FLAT_STYLES})
    pixels = torch.randint(0, 256, (8, 64, 64, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    owners = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    renders = Renders(pixels, owners, torch.arange(8) % len(STYLES))
    judge = load_judge(TINY / "judge")
    vae = AutoencoderKL.from_pretrained(TINY, subfolder="vae", dtype=torch.float32)
    report = measure_quality(CONCEPTS, drawn, renders, TINY, vae, (judge, first_is_right))
    seen = style_probabilities(judge, [Image.fromarray(image) for image in pixels]).argmax(dim=1)
    for place, style in enumerate(STYLES):
        real = report["styles"]["real"][style]
        assert real["as_is"] == float((seen[place::4] == place).float().mean())
        assert 0 <= real["after_vae"] <= 1
        assert f"| real {style} renders of the 2 best known things; after the VAE |" in quality_table(report)
    second = report["names"]["second_judge"]
    assert (second["known"], second["everything"]) == (0.5, 0.3333)
    assert second["real_known"] == {"flat": 0.5, "3d": 0.5}
    assert set(report["styles"]["styled"]) == set(FLAT_STYLES)
    assert all(sum(shares.values()) == pytest.approx(1) for shares in report["styles"]["styled"].values())
    lines = quality_table(report).splitlines()
    assert lines[0] == "| what | judge | second judge |"
    assert {line.count("|") for line in lines} == {4}
    for style in FLAT_STYLES:
        (row,) = (line for line in lines if line.split(" | ")[0].endswith(f"guidance 4: {style}"))
        assert "fluent-3d" in row
    for style, shares in report["styles"]["styled"].items():
        shares |= {name: 0.9 if name == style else 0.05 for name in STYLES}
    assert "| mean of the style words: the right set | 90.0% |  |" in quality_table(report)
    assert "| mean of the style words: 3D, which it never saw | 5.0% |  |" in quality_table(report)
    write_report(report, drawn, tmp_path / "report")
    assert Image.open(tmp_path / "report" / "contact_sheet.png").size[0] > 64


def test_the_size_is_that_of_the_base_without_the_judge(tmp_path: Path) -> None:
    judge = sum(file.stat().st_size for file in (TINY / "judge").iterdir()) / 1e6
    everything = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) / 1e6
    assert 20 < size_of(TINY) < everything - judge
