"""compare.png: what was trained on, base and arms, real images where there are any, and the strengths in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flatlora_diffusion.compare import picture_grid as grid_module
from flatlora_diffusion.compare.evaluator import PromptSets
from flatlora_diffusion.compare.picture_grid import MAX_THUMBNAILS, comparison_grid, grid_items
from flatlora_diffusion.gallery.grid import Band

TRAINED, BASE, LORA, FLAT, REAL, HALF, MORE = (
    (230, 0, 0),
    (0, 230, 0),
    (0, 0, 230),
    (230, 230, 0),
    (0, 230, 230),
    (230, 0, 230),
    (90, 90, 0),
)
CELL = grid_module.CELL**2
PROMPTS = tuple(f"an icon of thing {number}" for number in range(9))


class Drawn:
    """In place of the evaluator: one colour per model."""

    def __init__(
        self, folder: Path, prompts: Sequence[str], real: Sequence[str] = (), names: Mapping[str, str] | None = None
    ) -> None:
        self.prompts = PromptSets(tuple(prompts), (), (0,), 2.5)
        self.training = [square(TRAINED)] * 23
        self.heldout = {prompt: square(REAL) for prompt in real}
        self.names = names or {}
        self.folder, self.asked = folder, list[Any]()

    def pictures(self, lora: Path | None) -> list[Path]:
        colour = {None: BASE, Path("lora"): LORA, Path("flat"): FLAT}[lora]
        file = self.folder / f"{lora}.png"
        square(colour).save(file)
        return [file] * len(self.prompts.style)

    def pictures_at_strengths(self, lora: Path, prompt: str, strengths: Sequence[float]) -> list[Image.Image]:
        return [square({0.0: BASE, 0.5: HALF, 1.0: LORA, 1.5: MORE}[at]) for at in strengths]

    def strength_items(self, *asked: Any) -> list[Any]:
        self.asked.append(asked)
        return ["pieces"]


RUNS: Any = [
    SimpleNamespace(arm=SimpleNamespace(name=name, changes={}), lora=Path(key), steps=150)
    for name, key in (("LoRA", "lora"), ("Flat-LoRA", "flat"))
]


def square(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (64, 64), colour)


def drawn(evaluator: Any, captions: Sequence[str] = ()) -> np.ndarray:
    return np.asarray(comparison_grid(RUNS, evaluator, captions))


def area(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """How many cells are of this colour."""
    return (pixels == colour).all(axis=2).sum() / CELL


def first_row(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(axis=2).any(axis=1).argmax())


def test_it_has_the_training_images_then_base_arms_and_real_images_then_the_strengths(tmp_path: Path) -> None:
    pixels = drawn(Drawn(tmp_path, PROMPTS[:8], PROMPTS))
    assert [area(pixels, colour) for colour in (FLAT, REAL)] == [8, 8]
    assert [area(pixels, colour) for colour in (BASE, LORA)] == [8 + 2, 8 + 2]
    assert [area(pixels, colour) for colour in (HALF, MORE)] == [2, 2]
    assert 0 < area(pixels, TRAINED) < 4
    order = [first_row(pixels, colour) for colour in (TRAINED, BASE, LORA, FLAT, REAL, HALF)]
    assert order == sorted(order)
    assert len(set(order)) == len(order)
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all(), "something runs off the picture"


def test_without_real_images_their_row_is_absent_and_a_missing_one_is_left_blank(tmp_path: Path) -> None:
    none, some, all_ = (drawn(Drawn(tmp_path, PROMPTS[:8], PROMPTS[:count])) for count in (0, 3, 8))
    assert area(none, REAL) == 0
    assert area(some, REAL) == 3
    assert len(none) < len(some) == len(all_)


def test_the_grid_fits_on_one_screen(tmp_path: Path) -> None:
    few, many = Drawn(tmp_path, PROMPTS[:1]), Drawn(tmp_path, PROMPTS)
    many.training *= 3
    pixels = drawn(many)
    assert area(pixels, FLAT) == 8
    assert pixels.shape[1] == drawn(Drawn(tmp_path, PROMPTS[:8])).shape[1]
    assert area(drawn(few), FLAT) == 1
    assert area(drawn(few), MORE) == 1


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The bands and the caption of what is drawn."""
    found: list[Any] = []

    def watched(*given: Any) -> Image.Image:
        found.extend(given)
        return square(BASE)

    monkeypatch.setattr(grid_module, "labelled_bands", watched)
    return found


def test_things_are_named_where_their_names_are_known_and_the_caption_has_a_whole_prompt(
    tmp_path: Path, written: list[Any]
) -> None:
    comparison_grid(RUNS, Drawn(tmp_path, PROMPTS, names={PROMPTS[0]: "peach"}), PROMPTS[8:])  # type: ignore[arg-type]
    (_, models, strengths), caption = written
    assert list(models.column_labels[:2]) == ["peach", PROMPTS[1]]
    assert list(strengths.column_labels[:4]) == ["peach: 0", "0.5", "1", "1.5"]
    assert PROMPTS[0] in caption
    assert "not trained on any of these prompts" in caption
    assert "same seed and settings, 150 steps, guidance 2.5" in caption
    assert "8 of 9 prompts" in caption
    assert "LoRA at several strengths, 0 is the base" in caption


def test_settings_that_a_row_names_are_not_called_the_same(tmp_path: Path, written: list[Any]) -> None:
    arm = SimpleNamespace(name="SAM, max_train_steps 300", changes={"max_train_steps": 300})
    longer: Any = SimpleNamespace(arm=arm, lora=Path("flat"), steps=300)
    comparison_grid([RUNS[0], longer], Drawn(tmp_path, PROMPTS), [])  # type: ignore[arg-type]
    assert "150 steps" in written[1]


def test_trained_prompts_are_not_called_new_and_omitted_images_are_counted(tmp_path: Path, written: list[Any]) -> None:
    evaluator = Drawn(tmp_path, PROMPTS[:2])
    evaluator.training *= 2
    comparison_grid(RUNS, evaluator, PROMPTS)  # type: ignore[arg-type]
    bands: Sequence[Band] = written[0]
    assert "not trained on" not in written[1]
    assert f"{MAX_THUMBNAILS} of 46 training images" in written[1]
    assert len(bands[0].rows[0]) == MAX_THUMBNAILS


def test_only_the_strengths_in_between_are_drawn_for_it(tmp_path: Path) -> None:
    evaluator: Any = Drawn(tmp_path, PROMPTS)
    assert grid_items(RUNS[0], evaluator) == ["pieces"]
    assert evaluator.asked == [("LoRA", Path("lora"), PROMPTS[:8:4], grid_module.STRENGTHS)]
