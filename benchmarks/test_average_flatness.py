"""`average_flatness`: a study in miniature from training to the page, and that the page says what the JSON holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_random_sdxl import save_icons, save_tiny_random_sdxl

from benchmarks import populations
from benchmarks.average_flatness import (
    AVERAGE,
    BASE,
    CUT,
    FILE,
    HELDOUT,
    MEMBER_NAMES,
    SEGMENTS,
    TRAINING,
    WEAKENED,
    Group,
    distance,
    icon_rises,
    measure,
    plane_through,
)
from benchmarks.average_flatness_page import PICTURE, along, on_segment, percent_less, picture, section, table_of
from benchmarks.population_icons import Style
from benchmarks.populations import Study
from benchmarks.populations_page import PAGE
from flatlora_diffusion.config import FlatnessConfig
from flatlora_diffusion.flatness.landscape import expected_rise
from flatlora_diffusion.flatness.merged_weights import probe_loss_at
from flatlora_diffusion.sdxl.objective import Objective
from flatlora_diffusion.sdxl.sampling import evaluating

CONFIG = FlatnessConfig(
    sigmas=(0.3,), rise_draws=2, radii=(0.01,), trace_probes=2, probe_draws=2, surface_points=3, extent=2.0
)
PAGE_WORDS = " ".join(PAGE.read_text(encoding="utf-8").split())
SETTINGS = {"rank": 2, "max_train_steps": 3, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of a random base of 32 pixels, whose runs have 3 steps; its style and its folder."""
    folder = tmp_path_factory.mktemp("average-flatness")
    base = str(save_tiny_random_sdxl(folder / "base"))
    style = Style(save_icons(folder / "training", 3), {HELDOUT: save_icons(folder / "heldout", 4)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(populations, "BASE", base)
        patch.setattr(populations, "POINTS", 1)
        settings = populations.SETTINGS | SETTINGS | {"pretrained_model_name_or_path": base}
        patch.setattr(populations, "SETTINGS", settings)
        yield Study(style, folder / "3d"), style, folder / "pieces"


@pytest.fixture(scope="module")
def group(bench: Any) -> Group:
    study, _, _ = bench
    return Group(study, {TRAINING: study.samples[HELDOUT][:2], HELDOUT: study.samples[HELDOUT][2:]}, 0, CONFIG)


@pytest.mark.long
def test_a_group_is_trained_measured_and_put_on_a_page_and_a_second_call_measures_nothing(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, style, work = bench
    result = measure(study, style, work, 1, CONFIG, 3)
    assert {name: len(icons) for name, icons in result["icons"].items()} == {TRAINING: 3, HELDOUT: 3}
    middle = result["plane"]["losses"][HELDOUT][1][1]
    assert middle == pytest.approx(1e-5 * table_of(result, HELDOUT, "loss", [AVERAGE])[0].mean(), abs=1e-6)
    average, members = (table_of(result, TRAINING, "loss", of).mean() for of in ([AVERAGE], MEMBER_NAMES))
    for kind, place in (("average to base", 0), ("member to average", -1)):
        assert along(result, TRAINING, kind)[place].mean == pytest.approx(average - members)
    assert len([line for line in section(result).splitlines() if line.startswith("|")]) == (2 + 6) + (2 + 8)
    picture(result).save(tmp_path / "plane.png")
    with Image.open(tmp_path / "plane.png") as drawn:
        assert drawn.width > drawn.height
    monkeypatch.setattr(Group, "weights", property(lambda self: pytest.fail("a piece was measured twice")))
    assert measure(study, style, work, 1, CONFIG, 3) == result


@pytest.mark.long
def test_the_average_is_the_mean_of_the_merged_weights_and_the_weakened_member_is_as_long(group: Group) -> None:
    for name, weight in group.weights[AVERAGE].items():
        mean = torch.stack([group.weights[member][name] for member in MEMBER_NAMES]).mean(dim=0)
        torch.testing.assert_close(weight, mean, rtol=1e-5, atol=1e-6)
    base = group.weights[BASE]
    assert distance(group.weights[WEAKENED], base) == pytest.approx(distance(group.weights[AVERAGE], base), rel=1e-4)
    assert 0.1 < distance(group.weights[AVERAGE], base) < distance(group.weights[MEMBER_NAMES[0]], base)


@pytest.mark.long
def test_rises_by_icon_are_those_of_the_flatness_command(bench: Any, group: Group) -> None:
    sdxl, weights = bench[0].sdxl, group.weights[AVERAGE]
    _, found = icon_rises(group.losses()[HELDOUT], weights, (0.1, 0.3), 2, seed=5)
    loss = probe_loss_at(sdxl.unet, Objective(sdxl.scheduler), group.probes[HELDOUT], 16)
    with evaluating(sdxl.unet):
        expected = expected_rise(loss, weights, 0.3, 2, seed=5)
    assert len(found) == 2
    assert float(found.mean()) == pytest.approx(expected.mean, rel=1e-3)


def test_a_plane_through_three_points_has_them_in_it_and_their_mean_as_origin() -> None:
    rng = torch.Generator().manual_seed(0)
    points = [{"a": torch.randn(3, 4, generator=rng), "b": torch.randn(2, 5, generator=rng)} for _ in range(3)]
    plane = plane_through(points)
    for point, (a, b) in zip(points, plane.members, strict=True):
        for name, weight in plane.at(a, b).items():
            torch.testing.assert_close(weight, point[name])
    (x1, y1), (x2, y2) = plane.members[:2]
    assert y1 == pytest.approx(y2)
    assert x2 - x1 == pytest.approx(distance(points[0], points[1]))
    assert sum(b for _, b in plane.members) == pytest.approx(0, abs=1e-6)


@pytest.fixture(scope="module")
def result() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_the_page_has_the_tables_and_the_picture_of_the_committed_figures(result: Any) -> None:
    said = PAGE.read_text(encoding="utf-8")
    assert section(result) in said
    assert f"]({PICTURE.name})" in said
    assert PICTURE.is_file()


def test_no_segment_between_members_and_average_has_a_barrier_as_the_page_says(result: Any) -> None:
    segments, better = [(one, other) for one, other in SEGMENTS if other != BASE], 0
    for name in (TRAINING, HELDOUT):
        loss = {point: table_of(result, name, "loss", [point]).mean(axis=1) for point in (*MEMBER_NAMES, AVERAGE)}
        for one, other in segments:
            for place, at in enumerate(result["between"], 1):
                chord = (1 - at) * loss[one] + at * loss[other]
                assert np.all(on_segment(result, name, one, other, place).mean(axis=1) < chord), (one, other, at)
        members = np.stack([loss[member] for member in MEMBER_NAMES])
        assert np.all(loss[AVERAGE] < members.mean(axis=0))
        better += int(np.sum(loss[AVERAGE] < members.min(axis=0)))
    groups = len(result["points"])
    assert f"on all {groups * len(segments)} segments between members and average" in PAGE_WORDS
    assert f"better than the best of them in {better} of {2 * groups} cases" in PAGE_WORDS
    apart = [one["between members"] / one["member 1"] for one in result["lengths"].values()]
    assert apart == pytest.approx([2**0.5] * groups, rel=0.03), "at right angles, of one length"


@pytest.mark.parametrize("name", [TRAINING, HELDOUT])
def test_the_average_is_hardly_flatter_and_no_shorter_lora_as_the_page_says(result: Any, name: str) -> None:
    measures = [measure for measure in result["points"]["0"][AVERAGE][name] if measure != "loss"]
    assert "Rise, worst case and trace are 2 to 3 % below the members'" in PAGE_WORDS
    for measured in measures:
        less = percent_less(result, name, measured, AVERAGE, MEMBER_NAMES)
        assert -3.5 < less.mean < -1.5, measured
        assert less.high is not None
        assert less.high < 0, measured
    loss = percent_less(result, name, "loss", AVERAGE, [WEAKENED])
    assert loss.high is not None
    assert loss.high < 0
    for measured in measures:
        if measured == "trace":  # not measured there
            continue
        less = percent_less(result, name, measured, AVERAGE, [WEAKENED])
        assert less.high is not None
        assert less.low is not None
        if measured.startswith("worst"):
            assert less.high < 0, measured
        elif measured.startswith("rise"):
            assert less.low > 0 or name != TRAINING, measured
            base, members = (table_of(result, name, measured, of).mean() for of in ([BASE], MEMBER_NAMES))
            assert base < members
            cut = percent_less(result, name, measured, CUT, MEMBER_NAMES)
            assert -6.6 < cut.mean < -4.3
    worse = percent_less(result, TRAINING, "loss", CUT, MEMBER_NAMES)
    assert worse.low is not None
    assert worse.low > 0
