"""matplotlib's SVG as an element of the report's page: its fonts, its colours, nothing that the page has elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from markupsafe import Markup

from flatlora_diffusion.charts.palette import TONES

_HOVER = "hover-"
_VARIABLES = {tone.light: f"var(--{name})" for name, tone in TONES.items()}
_NUMBER = re.compile(r"-?\d+\.\d+")
_COLOUR = re.compile("#[0-9a-f]{6}")
_FONT = re.compile(r"font: [^;]*?(\d+(?:\.\d+)?px)[^;]*")
_PLACED = ("d", "x", "y", "transform")
KINDS = ("seed", "mean")
"""The ids that become classes: the line of one seed, and that of all."""


def hover(words: list[str], text: str) -> str:
    """The id for a part of a figure that shows `text` when the pointer rests on it; `words` collects the texts."""
    words.append(text)
    return f"{_HOVER}{len(words) - 1}"


def page_svg(svg: bytes, kind: str, label: str, words: Sequence[str]) -> Markup:
    """`svg` for the page as an element of class `kind`, which a screen reader calls `label` or, without one, skips.

    matplotlib's ids, style sheet and sizes would meddle with the page's or with those of another chart: what is used
    by its id is copied to its place, and the ids that we gave become classes.
    """
    found = ElementTree.fromstring(svg)
    shapes = {shape.get("id"): shape for shape in found.iter() if shape.get("id") and _name(shape) == "path"}
    heard = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    root = Element("svg", {"class": kind, "viewBox": found.get("viewBox", ""), **heard})
    for child in found:
        _copy(child, root, shapes, words)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _copy(part: Element, parent: Element, shapes: dict[str | None, Element], words: Sequence[str]) -> None:
    """Add `part` to `parent`, without what cannot be seen."""
    name, own_id, style = _name(part), part.get("id", ""), _style(part)
    if name in ("metadata", "defs") or style == "fill: none":
        return
    if name == "use":
        shape = shapes[next(value for key, value in part.items() if key.endswith("href")).removeprefix("#")]
        place = f"translate({_short(part.get('x', '0'))} {_short(part.get('y', '0'))})"
        parent.append(Element("path", {"d": _short(shape.get("d", "")), "transform": place, "style": style}))
        return
    if name == "image":  # a field of colours, inlined by matplotlib
        source = next(value for key, value in part.items() if key.endswith("href"))
        found = {key: part.get(key, "") for key in ("x", "y", "width", "height", "transform") if part.get(key)}
        parent.append(Element("image", {"href": source, **found}))
        return
    kind = "mark" if own_id.startswith(_HOVER) else own_id if own_id in KINDS else ""
    new = parent if name == "g" and not kind else ElementTree.SubElement(parent, name)
    if new is not parent:
        found = {"class": kind, "style": style} | {key: _short(part.get(key, "")) for key in _PLACED}
        new.attrib.update({key: value for key, value in found.items() if value})
        new.text = (part.text or "").strip() or None
    for child in part:
        _copy(child, new, shapes, words)
    if kind == "mark":
        ElementTree.SubElement(new, "title").text = words[int(own_id.removeprefix(_HOVER))]


def _style(part: Element) -> str:
    """The style in the page's colours; of the font only the size is kept."""
    style = _FONT.sub(r"font-size: \1", part.get("style", ""))
    kept = [one.strip() for one in style.split(";") if one.strip() and not one.strip().startswith("font-family")]
    return _COLOUR.sub(lambda match: _VARIABLES.get(match.group(), match.group()), "; ".join(kept))


def _short(text: str) -> str:
    """`text` with its numbers to a hundredth of a pixel."""
    return _NUMBER.sub(lambda match: f"{float(match.group()):.2f}".rstrip("0").rstrip("."), " ".join(text.split()))


def _name(part: Element) -> str:
    return part.tag.rpartition("}")[2]
