"""`populations`: what the README and the page say holds in the committed figures; how the tables are made."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_random_klein import save_tiny_random_klein
from tiny_random_sdxl import save_icons
from torch import nn

from benchmarks import populations
from benchmarks.population_icons import REPORTED, TUNING, TUNING_FLAT, Style
from benchmarks.population_subjects import SUBJECTS, SUBJECTS_ON
from benchmarks.population_uses import ALONE, ALONE_IN_BOTH, BITS, USES, in_bits
from benchmarks.populations import SETTINGS, seed_of
from benchmarks.populations_page import (
    AVERAGE,
    FOLDER,
    FORGETTING,
    PAGE,
    POPULATIONS,
    USES_FILE,
    Study,
    compared,
    equal_forgetting,
    holm,
    style_section,
    uses_section,
)
from flatlora_diffusion.config import INCLUDED_BASES, TINY_KLEIN
from flatlora_diffusion.evaluation.crossed_statistics import CrossedDifference

README = FOLDER.parent / "README.md"
CHOOSING = FOLDER.parent / "docs" / "choosing_a_method.md"
LISTS = (*REPORTED, TUNING, TUNING_FLAT)


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.read(FOLDER / "populations.json")


@pytest.fixture(scope="module")
def second_style() -> Study:
    return Study.read(FOLDER / "populations_second_style.json")


@pytest.fixture(scope="module")
def on_klein() -> Study:
    return Study.read(FOLDER / "populations_klein.json")


def interval(difference: CrossedDifference | None) -> tuple[float, float]:
    """The interval of a difference that has one."""
    assert difference is not None
    assert difference.low is not None
    assert difference.high is not None
    return difference.low, difference.high


def test_the_average_is_better_where_both_forget_as_much_in_two_styles_as_the_readme_says(
    study: Study, second_style: Study
) -> None:
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert "in two styles with five groups of seeds each" in readme
    assert "forgets a fifth less" in readme
    for style in (study, second_style):
        groups = style.groups(AVERAGE)
        differences, _ = compared(style, AVERAGE, groups)
        assert len(groups) == 5
        assert all(interval(differences[name].equal)[1] < 0 for name in POPULATIONS)
        forgets = style.reference(AVERAGE, FORGETTING, groups).mean()
        assert -differences[FORGETTING].plain.mean / forgets == pytest.approx(0.2, abs=0.03)


def test_a_lora_of_three_times_the_rank_does_as_much_on_what_the_base_knows_as_the_readme_says(study: Study) -> None:
    readme = " ".join(README.read_text(encoding="utf-8").split())
    assert "one LoRA of three times the rank did as much in one style, and the average of three of that rank" in readme
    higher, _ = compared(study, "average of 3 of rank 12", study.groups("average of 3 of rank 12"))
    assert all(interval(higher[name].equal)[1] < 0 for name in POPULATIONS), "less one LoRA of rank 12"
    rank_12, average = (compared(study, name, study.groups(name))[0] for name in ("rank 12", AVERAGE))
    for name in ("known 200", "known 615"):
        low, high = interval(rank_12[name].equal)
        other = average[name].equal
        assert other is not None
        assert low < other.mean < high
    low, high = interval(rank_12["unknown"].equal)
    assert low < 0 < high


def test_dora_is_better_in_every_population_as_the_guide_says(study: Study) -> None:
    dora, _ = compared(study, "DoRA", study.groups("DoRA"))
    assert all(interval(dora[name].equal)[1] < 0 for name in POPULATIONS)
    assert "had a lower loss than LoRA on every population" in " ".join(CHOOSING.read_text(encoding="utf-8").split())


def test_an_average_loses_less_beside_another_style_as_the_guide_says() -> None:
    table = uses_section(json.loads(USES_FILE.read_text(encoding="utf-8")))
    assert table in PAGE.read_text(encoding="utf-8")
    (row,) = (line for line in table.splitlines() if line.startswith("| beside"))
    _, _, _, of_lora, of_average, *_ = (cell.strip() for cell in row.split("|"))
    assert of_lora.startswith("+")
    assert of_average.startswith("**\N{MINUS SIGN}"), "bold: differs from 0 after Holm's correction"
    assert "loses less beside a LoRA of another style" in " ".join(CHOOSING.read_text(encoding="utf-8").split())


def test_two_members_give_about_70_percent_of_three_as_the_guide_says(study: Study) -> None:
    groups = study.groups(AVERAGE)
    two, three = (
        np.mean([compared(study, name, groups)[0][population].plain.mean for population in POPULATIONS])
        for name in ("average of 2", AVERAGE)
    )
    assert two / three == pytest.approx(0.7, abs=0.05)
    assert "Two give about 70 % of what three do" in " ".join(CHOOSING.read_text(encoding="utf-8").split())


def test_what_the_page_says_of_six_members_of_flat_lora_and_of_sam_holds(study: Study) -> None:
    def found(subject: str, name: str) -> tuple[CrossedDifference, CrossedDifference]:
        plain, equal = compared(study, subject, study.groups(subject))[0][name]
        assert equal is not None
        return plain, equal

    six, three = (
        np.mean([found(subject, name)[0].mean for name in POPULATIONS]) for subject in ("average of 6", AVERAGE)
    )
    assert six / three == pytest.approx(1.25, abs=0.05)
    for name, margin in zip(POPULATIONS, (1, 1, 4), strict=True):
        flat, _ = found("Flat-LoRA, paper", name)
        assert abs(flat.mean) < 1.5
        assert round(flat.margin or 0) == margin
    known, unknown = POPULATIONS[:2], POPULATIONS[2]
    for subject in ("Flat-LoRA 0.4", "SAM 0.125"):
        for part in (part for name in known for part in found(subject, name)):
            assert part.low is not None
            assert part.high is not None
            assert part.low < 0 < part.high
    for subject in ("Flat-LoRA 0.4", "SAM 0.125", "SAM 0.25"):
        assert all(part.high is not None and part.high < 0 for part in found(subject, unknown)), subject
    assert all(part.low is not None and part.low > 0 for part in found("SAM 0.25", "known 200"))
    assert all(found(sam, FORGETTING)[0].mean > 0 for sam in ("SAM 0.25", "SAM 0.125"))


def test_sam_in_some_steps_or_by_image_differs_only_on_the_unknown_as_the_page_says(study: Study) -> None:
    for subject in ("SAM 0.125, every 2nd step", "SAM 0.125, last 90 steps", "SAM, own rho for each image"):
        found = compared(study, subject, study.groups(subject))[0]
        unknown = found[POPULATIONS[2]].equal
        assert unknown is not None
        assert unknown.high is not None
        assert unknown.high < 0
        for name in POPULATIONS[:2]:
            known = found[name].equal
            assert known is not None
            assert known.low is not None
            assert known.high is not None
            if subject == "SAM, own rho for each image":
                assert known.low > 0
            else:
                assert known.low < 0 < known.high


def test_on_a_klein_the_average_is_better_and_strong_noise_worse_as_the_page_says(on_klein: Study) -> None:
    known, unknown = POPULATIONS[:2], POPULATIONS[2]
    assert len(on_klein.groups(AVERAGE)) == 5
    average, flat, strong, sam = (
        compared(on_klein, name, on_klein.groups(name))[0]
        for name in (AVERAGE, "Flat-LoRA, paper", "Flat-LoRA 0.4", "SAM, rise 10 %")
    )
    assert all(interval(average[name].equal)[1] < 0 for name in POPULATIONS)
    forgets = on_klein.reference(AVERAGE, FORGETTING, on_klein.groups(AVERAGE)).mean()
    assert -average[FORGETTING].plain.mean / forgets == pytest.approx(0.2, abs=0.03)
    for name in known:
        assert interval(flat[name].equal)[0] < 0 < interval(flat[name].equal)[1]
        assert interval(strong[name].equal)[0] > 0
    assert interval(flat[unknown].equal)[1] < 0
    assert interval(sam["known 200"].equal)[0] > 0
    for name in ("known 615", unknown):
        assert interval(sam[name].equal)[0] < 0 < interval(sam[name].equal)[1]


def test_the_page_has_the_tables_of_the_committed_figures(study: Study, on_klein: Study) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert style_section(study, "3D icons") in page
    assert style_section(on_klein, "3D icons on a FLUX.2 klein") in page


def test_groups_share_no_seed_and_lists_no_icon(study: Study) -> None:
    seeds = [seed_of(group, member) for group in range(50) for member in range(3)]
    assert len(set(seeds)) == len(seeds)
    lists = {name: set(icons) for name, icons in study.data["lists"].items()}
    of_3d = [icons for name, icons in lists.items() if "flat" not in name]
    flat = [icons for name, icons in lists.items() if "flat" in name]
    for kind in (of_3d, flat):
        assert sum(map(len, kind)) == len(set().union(*kind))


def made_up(strengths: dict[tuple[str, float], float]) -> Study:
    """Two groups of two icons with two draws whose losses are all one number by subject and strength."""
    subjects: dict[str, Any] = {name: SUBJECTS[name].describe() for name in {name for name, _ in strengths}}
    names = (*POPULATIONS, FORGETTING, "tuning flat")
    losses = {
        (name, 0, strength): {group: {of: np.full((2, 2), value) for of in names} for group in (0, 1)}
        for (name, strength), value in strengths.items()
    }
    return Study({"subjects": subjects}, losses)


def test_whichever_forgets_more_is_weakened_until_both_forget_as_much() -> None:
    """LoRA forgets 100 s, so a subject that forgets 80 meets it at 0.8; one that forgets 200 s meets it at 0.5."""
    lora = {("lora", 0.7): 70.0, ("lora", 1.0): 100.0}
    weaker = equal_forgetting(made_up(lora | {("EMA 0.99", 1.0): 80.0}), "EMA 0.99", [0, 1])
    assert weaker == (1.0, pytest.approx(0.8, abs=1e-3))
    sam = {("SAM 0.25", 0.7): 140.0, ("SAM 0.25", 1.0): 200.0}
    assert equal_forgetting(made_up(lora | sam), "SAM 0.25", [0, 1]) == (pytest.approx(0.5, abs=1e-3), 1.0)
    alone = equal_forgetting(made_up(lora | {("SAM 0.25", 1.0): 200.0}), "SAM 0.25", [0, 1])
    assert alone is None, "it was measured at one strength alone"


def test_between_strengths_losses_are_interpolated_through_the_base() -> None:
    study = made_up({("lora", 0.7): -0.7 + 0.49, ("lora", 1.0): -1 + 1})  # s^2 - s
    table = study.table("lora", "flat", [0, 1], 0.5)
    assert table.shape == (2, 2)
    assert float(table.mean()) == pytest.approx(0.25 - 0.5)


def test_passes_are_counted_in_those_of_one_lora() -> None:
    assert SUBJECTS["lora"].passes == 1
    assert SUBJECTS["average of 3"].passes == 3
    assert SUBJECTS["average of 3, 150 steps"].passes == 1.5
    assert SUBJECTS["SAM 0.25"].passes == 2
    assert SUBJECTS["SAM 0.125, every 2nd step"].passes == 1.5
    assert SUBJECTS["3 x steps, cosine rate"].passes == SUBJECTS["3 x batch"].passes == 3
    assert Path(FOLDER / "populations.json").stat().st_size < 4 * 2**20


def test_a_base_in_few_bits_is_whole_again_afterwards() -> None:
    linear, convolution = nn.Linear(64, 8), nn.Conv2d(3, 3, 1)
    unet = nn.Sequential(linear, convolution)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    for kind in BITS.values():
        with in_bits(unet, kind):
            rough = linear.weight.detach()
            assert 0 < float((rough - before["0.weight"]).abs().max()) < 0.05
            assert torch.equal(convolution.weight, before["1.weight"])
        assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())


def test_the_price_of_a_use_is_its_loss_less_that_without_it() -> None:
    """The base loses 3 more in each number of bits, LoRA 5 in each use and the average 2 less than LoRA."""
    losses = {name: {ALONE: "10.0 20.0", ALONE_IN_BOTH: "10.0 20.0"} for name in ("lora", "average of 3")}
    for name, rise in (("lora", 5.0), ("average of 3", 3.0)):
        losses[name] |= {use: f"{10 + rise} {20 + rise}" for use in USES}
    base = dict.fromkeys(BITS, "13.0 23.0") | {ALONE: "10.0 20.0"}
    rows = [{"subject": name, "group": group, "losses": of} for name, of in losses.items() for group in (0, 1)]
    page = uses_section({"list": "known 200", "base": {"0": base, "1": base}, "rows": rows})
    table = [line for line in page.splitlines() if line.startswith(("| base in", "| cut", "| beside"))]
    assert len(table) == len(USES)
    for line in table:
        assert "+5 ± 0 |" in line
        assert "\N{MINUS SIGN}2 ± 0" in line
        assert ("| +3 ± 0 |" in line) == line.startswith("| base in")


def test_subjects_are_trained_and_measured_on_a_klein(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a random klein and three icons in the place of each list, two steps a run."""
    icons = save_icons(tmp_path / "icons")
    monkeypatch.setitem(INCLUDED_BASES, TINY_KLEIN, save_tiny_random_klein(tmp_path / "klein"))
    monkeypatch.setitem(SETTINGS, "max_train_steps", 2)
    monkeypatch.setattr(populations, "POINTS", 2)
    monkeypatch.setattr(populations, "style_3d", lambda *_: Style(icons, dict.fromkeys(LISTS, icons)))
    flags = ["--work", str(tmp_path / "work"), "--base", "tiny_klein", "--groups", "1", "--out", str(tmp_path)]
    try:
        populations.main(flags)
    finally:
        logging.disable(logging.NOTSET)
    study = Study.read(tmp_path / "populations_klein.json")
    assert study.data["settings"]["pretrained_model_name_or_path"] == "tiny_klein"
    assert [name for name in study.data["subjects"] if study.groups(name) == [0]] == list(SUBJECTS_ON[TINY_KLEIN])
    average = study.table("average of 3", "unknown", [0])
    assert average.shape == (1, 3)
    assert np.abs(average).max() > 0
    for member in range(3):
        assert not np.allclose(average, study.table("lora", "unknown", [0], 1.0, member))


def test_holm_rejects_step_by_step() -> None:
    assert holm([0.01, 0.04, 0.03]) == [True, False, False]  # 0.01 <= 0.05/3, then 0.03 > 0.05/2
    assert holm([0.01, 0.04, 0.02]) == [True, True, True]
    assert holm([0.06]) == [False]
    assert holm([]) == []
