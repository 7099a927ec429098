"""Charts show their data in distinguishable colours, and leave matplotlib's state unchanged."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from PIL import Image

from app.widgets.theme import COLOURS, CSS, SHADES
from flatlora_diffusion.charts.lines import Chart, Line, line_chart, surface_chart, titled_chart
from flatlora_diffusion.charts.palette import FLAT_LORA, LOOKS, LORA, OWN_LOOKS, PAPER, THIRD
from flatlora_diffusion.charts.rows import Dot, axis_row, dot_row, row_limits, sample
from flatlora_diffusion.config import METHODS

STEPS, FALLING, FLAT = (100, 200, 300), (0.3, 0.2, 0.1), (0.2, 0.2, 0.2)
# How linear RGB looks to whoever lacks a kind of cone (Machado, Oliveira and Fernandes 2009, severity 1).
SIGHT = {
    "all cones": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ),
}
TO_LMS = np.array(
    [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
)
TO_OKLAB = np.array(
    [[0.21045426, 0.7936178, -0.00407205], [1.9779985, -2.4285922, 0.4505937], [0.02590404, 0.78277177, -0.80867577]]
)


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def distance(one: str, two: str, sight: np.ndarray) -> float:
    """In OKLab, times 100: about 2 is the least that can be seen side by side."""
    places = [TO_OKLAB @ np.cbrt(TO_LMS @ np.clip(sight @ linear(colour), 0, 1)) for colour in (one, two)]
    return 100 * float(np.linalg.norm(places[0] - places[1]))


def contrast(one: str, two: str) -> float:
    light, dark = sorted((float(linear(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, two)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("paper", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_every_eye_tells_the_methods_apart(sight: str, paper: str) -> None:
    for one, two in itertools.combinations(LOOKS, 2):
        result = distance(getattr(one.tone, paper), getattr(two.tone, paper), SIGHT[sight])
        assert result > 8, (one.name, two.name, result)
    assert all(contrast(getattr(look.tone, paper), getattr(PAPER, paper)) > 3 for look in LOOKS)


def test_methods_differ_without_colour_too() -> None:
    assert len({look.marker for look in LOOKS}) == len({look.dashes for look in LOOKS}) == len(LOOKS)


def test_further_runs_of_a_method_are_seen_on_dark_paper_and_told_apart() -> None:
    for look in LOOKS:
        tones = list(look.tones.values())
        assert all(contrast(tone.dark, PAPER.dark) > 3 for tone in tones)
        for one, two in itertools.combinations(tones, 2):
            assert min(distance(*pair, SIGHT["all cones"]) for pair in zip(one, two, strict=True)) > 8, look.name


def test_the_app_has_the_colours_of_the_charts_in_light_and_dark() -> None:
    light, dark = CSS.split(".dark .gradio-container", 1)
    for title, shades in SHADES.items():
        method = next(name for name in METHODS if METHODS[name].title == title)
        tones = OWN_LOOKS.get(method, THIRD).tones
        assert shades == tuple(f"var(--{name})" for name in tones)
        assert COLOURS[title] == shades[0]
        for name, tone in tones.items():
            assert f"--{name}: {tone.light};" in light
            assert f"--{name}: {tone.dark};" in dark
    assert set(SHADES) == {row.title for row in METHODS.values()}


def charts() -> list[Chart]:
    line = Line("one", LORA, STEPS, FALLING, (0.01, 0.01, 0.01))
    bowl = [[float(a * a + b * b) for a in (-1, 0, 1)] for b in (-1, 0, 1)]
    return [
        line_chart([line], "step", zero="no difference"),
        titled_chart([line], "title", "x", "y", log=True),
        surface_chart([("bowl", bowl), ("flat", [[0.0] * 3] * 3)], 1.0, "title"),
        dot_row((-1, 1), [Dot(0.5, LORA, "half")], (0.2, 0.8), zero=True),
        axis_row((-1, 1)),
        sample(FLAT_LORA),
    ]


def test_charts_are_the_same_each_time_whatever_the_user_has_set(tmp_path: Path) -> None:
    for place, chart in enumerate(charts()):
        chart.save(tmp_path / f"{place}.png")
    pages = [chart.svg("kind", "label") for chart in charts()[:2]]
    before = settings()
    with matplotlib.rc_context({"lines.linewidth": 9, "axes.facecolor": "red", "svg.fonttype": "path"}):
        others = charts()
        assert [chart.svg("kind", "label") for chart in others[:2]] == pages
        for place, chart in enumerate(others):
            chart.save(tmp_path / "again.png")
            assert (tmp_path / "again.png").read_bytes() == (tmp_path / f"{place}.png").read_bytes()
        assert matplotlib.rcParams["lines.linewidth"] == 9
    assert settings() == before


def test_a_chart_that_cannot_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(path: Path, **_: object) -> None:
        path.write_bytes(b"half a chart")
        raise OSError(28, "No space left on device")

    (tmp_path / "chart.png").write_bytes(b"of the run before")
    chart = line_chart([], "step")
    monkeypatch.setattr(chart.figure, "savefig", breaks)
    with pytest.raises(OSError, match="No space left"):
        chart.save(tmp_path / "chart.png")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"chart.png": b"of the run before"}


def test_lines_show_their_data(tmp_path: Path) -> None:
    flat, steep = Line("flat", LORA, STEPS, FLAT, (0.1,) * 3), Line("steep", FLAT_LORA, STEPS, FALLING)
    for log in (False, True):
        both, same = (titled_chart(lines, "title", "x", "y", log) for lines in ([flat, steep], [flat, flat]))
        assert not np.array_equal(pixels(both, tmp_path), pixels(same, tmp_path))
    assert line_chart([flat, steep], "x").svg("", "") != line_chart([flat, flat], "x").svg("", "")


def test_logarithmic_axes_leave_out_what_they_cannot_show() -> None:
    line = Line("one", LORA, (0.0, 1.0, 2.0), (1.0, -1.0, 2.0), (0.1, 0.1, 3.0))
    axes = titled_chart([line], "title", "x", "y", log=True).figure.axes[0]
    assert np.asarray(axes.get_lines()[0].get_xydata()).tolist() == [[2.0, 2.0]]
    titled_chart([Line("all negative", LORA, (0.1, 1.0), (-1.0, -2.0))], "title", "x", "y", log=True)


@pytest.mark.parametrize("ys", [(2.1, 3.9), (3e-5, 4e-5), (1.0, 1e6), (1.0, 1.0)])
def test_logarithmic_axes_have_ticks(ys: tuple[float, float]) -> None:
    axes = titled_chart([Line("one", LORA, (0.05, 0.4), ys)], "title", "x", "y", log=True).figure.axes[0]
    low, high = axes.get_ylim()
    assert sum(low <= tick <= high for tick in axes.get_yticks()) >= 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.05", "0.4"]


def test_the_bottom_of_a_surface_is_dark_and_its_corner_bright() -> None:
    chart = charts()[2]
    bowl, flat = (axes.collections[0] for axes in chart.figure.axes[:2])
    assert bowl.get_clim() == flat.get_clim() == (0.0, 2.0), "one scale for all"
    heights = np.asarray(bowl.get_array()).reshape(161, 161)
    assert heights[80, 80] == pytest.approx(0, abs=1e-6)
    assert heights[::160, ::160] == pytest.approx(np.full((2, 2), 2.0))
    assert heights[80, 0] == pytest.approx(1)


def test_a_surface_on_a_page_has_its_field_as_a_picture_and_the_rest_in_the_pages_colours() -> None:
    bowl = [[float(a * a + b * b) for a in (-1, 0, 1)] for b in (-1, 0, 1)]
    drawn = ElementTree.fromstring(surface_chart([("bowl", bowl)], 1.0, "title").svg("kind", "label"))
    pictures = [one for one in drawn.iter() if one.tag == "image"]
    assert len(pictures) == 2  # the field, and the bar that explains it
    field = max(pictures, key=lambda one: float(one.get("width", 0)))
    kind, _, data = field.get("href", "").partition("base64,")
    assert kind == "data:image/png;"
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")).astype(int)
    middle, corner = pixels[len(pixels) // 2, pixels.shape[1] // 2], pixels[3, 3]
    assert corner.sum() > middle.sum() + 100
    words = {one.text: one.get("style") for one in drawn.iter() if one.tag == "text"}
    assert "var(--ink)" in str(words["title"])
    assert "var(--faint)" in str(words["along direction 1"])


def test_of_equal_lines_none_hides_another() -> None:
    axes = line_chart([Line("flat", FLAT_LORA, STEPS, FLAT), Line("lora", LORA, STEPS, FLAT)], "step").figure.axes[0]
    whole, dashed = (
        next(line for line in axes.get_lines() if line.get_color() == look.tone.light) for look in (FLAT_LORA, LORA)
    )
    assert dashed.get_linestyle() == "--"
    assert dashed.get_zorder() > whole.get_zorder(), "the whole line is seen between the dashes"
    axes = titled_chart(
        [Line(name, LORA, STEPS, FLAT, shade=shade) for shade, name in enumerate("ab")], "", "", ""
    ).figure.axes[0]
    first, second = (line for line in axes.get_lines() if line.get_gid() == "mean")
    assert first.get_color() != second.get_color()
    assert first.get_linewidth() > second.get_linewidth()


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    names = ["_private", "$x^$", "<script>", "a_b & c"]
    chart = titled_chart([Line(name, LORA, STEPS, FLAT) for name in names], "$title", "x", "y")
    chart.save(tmp_path / "chart.png")
    legend = chart.figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == names
    hostile = '</svg><script>alert(1)</script>" onload="x'
    markup = dot_row((0, 1), [Dot(0.5, LORA, hostile)], None, zero=False).svg("row", hostile)
    assert "<script>" not in markup
    assert markup.count("&lt;script&gt;") == 2
    assert 'onload="x"' not in markup


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.0, -0.004, 0.003], ["\N{MINUS SIGN}0.004", "\N{MINUS SIGN}0.002", "0", "0.002"]),
        ([0.0, 3e-8], ["0", "1e\N{MINUS SIGN}08", "2e\N{MINUS SIGN}08", "3e\N{MINUS SIGN}08"]),
        ([0.0], ["\N{MINUS SIGN}0.050", "\N{MINUS SIGN}0.025", "0", "0.025", "0.050"]),
        ([100_000.0, 100_400.0], ["100000", "100100", "100200", "100300", "100400"]),
    ],
)
def test_an_axis_has_round_numbers(values: list[float], ticks: list[str]) -> None:
    axes = axis_row(row_limits(values)).figure.axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ticks


def settings() -> dict[str, object]:
    """matplotlib's, but for the backend, which it decides when that is first asked for."""
    return {name: value for name, value in dict.items(matplotlib.rcParams) if name != "backend"}


def pixels(chart: Chart, folder: Path) -> np.ndarray:
    chart.save(folder / "chart.png")
    return np.asarray(Image.open(folder / "chart.png"))
