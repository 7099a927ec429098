"""The loss surfaces as an interactive HTML page, which works offline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from flatlora_diffusion.charts.palette import INK, PAPER, RULE

# All surfaces share one camera.
_TURN_TOGETHER = """
const plot = document.getElementById("{plot_id}");
const scenes = Object.keys(plot._fullLayout).filter(key => /^scene[0-9]*$/.test(key));
let turning = false;
plot.on("plotly_relayout", change => {
  const key = Object.keys(change).find(name => /^scene[0-9]*[.]camera$/.test(name));
  if (turning || key === undefined) return;
  turning = true;
  const update = {};
  for (const scene of scenes) if (scene + ".camera" !== key) update[scene + ".camera"] = change[key];
  Plotly.relayout(plot, update).then(() => { turning = false; });
});
"""
_IN_LIGHT_AND_DARK = """
const dark = matchMedia("(prefers-color-scheme: dark)");
const dress = () => {
  const [paper, ink, rule] = dark.matches ? DARK : LIGHT;
  const update = {paper_bgcolor: paper, "font.color": ink};
  for (const scene of scenes) for (const name of ["xaxis", "yaxis", "zaxis"]) {
    Object.assign(update, {[`${scene}.${name}.backgroundcolor`]: paper, [`${scene}.${name}.gridcolor`]: rule});
  }
  document.body.style.background = paper;
  Plotly.relayout(plot, update);
};
dark.addEventListener("change", dress);
dress();
"""
_LIGHT, _DARK = zip(PAPER, INK, RULE, strict=True)


def can_write() -> bool:
    """Whether plotly, which the page needs, is installed."""
    return find_spec("plotly") is not None


def write_surface_page(
    path: Path, surfaces: Sequence[tuple[str, Sequence[Sequence[float]]]], at: Sequence[float], title: str
) -> None:
    """Write the named surfaces over the axes `at`, side by side on one scale of height and colour."""
    from plotly.graph_objects import Surface
    from plotly.subplots import make_subplots

    names = [name for name, _ in surfaces]
    figure = make_subplots(
        cols=len(names), subplot_titles=names, specs=[[{"type": "scene"} for _ in names]], horizontal_spacing=0.01
    )
    heights = [height for _, grid in surfaces for row in grid for height in row]
    low, high = min(heights), max(heights)
    for column, (name, grid) in enumerate(surfaces, 1):
        figure.add_trace(
            Surface(
                x=list(at),
                y=list(at),
                z=[list(row) for row in grid],
                cmin=low,
                cmax=high,
                colorscale="Viridis",
                showscale=column == len(names),
                colorbar={"title": {"text": "loss"}, "len": 0.7},
                contours={"z": {"show": True, "usecolormap": True, "project": {"z": True}}},
                hovertemplate=f"{name}<br>direction 1: %{{x:.3g}}<br>direction 2: %{{y:.3g}}<br>"
                "loss: %{z:.5g}<extra></extra>",
            ),
            row=1,
            col=column,
        )
    room = 0.08 * (high - low or 1.0)
    figure.update_scenes(
        xaxis_title="direction 1",
        yaxis_title="direction 2",
        zaxis={"title": {"text": "loss"}, "range": [low - room, high + room]},
        camera={"eye": {"x": 1.5, "y": 1.5, "z": 0.9}},
    )
    figure.update_layout(title={"text": title}, margin={"l": 10, "r": 10, "t": 90, "b": 10}, font={"size": 13})
    figure.write_html(
        path,
        include_plotlyjs=True,
        div_id="surfaces",
        post_script=_TURN_TOGETHER
        + _IN_LIGHT_AND_DARK.replace("LIGHT", json.dumps(_LIGHT)).replace("DARK", json.dumps(_DARK)),
        default_height="92vh",
        config={"displaylogo": False, "responsive": True},
    )
