"""Conversion of matplotlib's SVG to an element of the report's page, with the page's fonts and colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from markupsafe import Markup

from flatlora_diffusion.charts.palette import TONES

_TOOLTIP = "tooltip-"
_VARIABLES = {tone.light: f"var(--{name})" for name, tone in TONES.items()}
_NUMBER = re.compile(r"-?\d+\.\d+")
_COLOUR = re.compile("#[0-9a-f]{6}")
_FONT = re.compile(r"font: [^;]*?(\d+(?:\.\d+)?px)[^;]*")
_ATTRIBUTES = ("d", "x", "y", "transform")
KINDS = ("seed", "mean")
"""The ids that become classes: the line of a seed, and the line of the mean."""


def add_tooltip(tooltips: list[str], text: str) -> str:
    """Append `text` to `tooltips`; returns the id for the part of a figure that has this tooltip."""
    tooltips.append(text)
    return f"{_TOOLTIP}{len(tooltips) - 1}"


def page_svg(svg: bytes, kind: str, label: str, tooltips: Sequence[str]) -> Markup:
    """Convert `svg` to an element of class `kind`, which screen readers call `label`, or skip without a label.

    matplotlib's ids, style sheet and sizes would conflict with those of the page and of other charts: references are
    replaced by copies, and our ids become classes.
    """
    source = ElementTree.fromstring(svg)
    shapes = {shape.get("id"): shape for shape in source.iter() if shape.get("id") and _name(shape) == "path"}
    aria = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    root = Element("svg", {"class": kind, "viewBox": source.get("viewBox", ""), **aria})
    for child in source:
        _copy(child, root, shapes, tooltips)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _copy(part: Element, parent: Element, shapes: dict[str | None, Element], tooltips: Sequence[str]) -> None:
    """Copy `part` into `parent`, without invisible elements."""
    name, own_id, style = _name(part), part.get("id", ""), _style(part)
    if name in ("metadata", "defs") or style == "fill: none":
        return
    if name == "use":
        shape = shapes[next(value for key, value in part.items() if key.endswith("href")).removeprefix("#")]
        offset = f"translate({_short(part.get('x', '0'))} {_short(part.get('y', '0'))})"
        parent.append(Element("path", {"d": _short(shape.get("d", "")), "transform": offset, "style": style}))
        return
    if name == "image":  # a colour mesh, inlined by matplotlib
        source = next(value for key, value in part.items() if key.endswith("href"))
        attributes = {key: part.get(key, "") for key in ("x", "y", "width", "height", "transform") if part.get(key)}
        parent.append(Element("image", {"href": source, **attributes}))
        return
    kind = "mark" if own_id.startswith(_TOOLTIP) else own_id if own_id in KINDS else ""
    new = parent if name == "g" and not kind else ElementTree.SubElement(parent, name)
    if new is not parent:
        attributes = {"class": kind, "style": style} | {key: _short(part.get(key, "")) for key in _ATTRIBUTES}
        new.attrib.update({key: value for key, value in attributes.items() if value})
        new.text = (part.text or "").strip() or None
    for child in part:
        _copy(child, new, shapes, tooltips)
    if kind == "mark":
        ElementTree.SubElement(new, "title").text = tooltips[int(own_id.removeprefix(_TOOLTIP))]


def _style(part: Element) -> str:
    """Return the style with the page's colours, and without font settings except the size."""
    style = _FONT.sub(r"font-size: \1", part.get("style", ""))
    rules = [rule.strip() for rule in style.split(";")]
    text = "; ".join(rule for rule in rules if rule and not rule.startswith("font-family"))
    return _COLOUR.sub(lambda match: _VARIABLES.get(match.group(), match.group()), text)


def _short(text: str) -> str:
    """Round the numbers in `text` to hundredths of a pixel."""
    return _NUMBER.sub(lambda match: f"{float(match.group()):.2f}".rstrip("0").rstrip("."), " ".join(text.split()))


def _name(part: Element) -> str:
    return part.tag.rpartition("}")[2]
