"""The icons the base is made of: fetched from npm, matched by code point, rendered to arrays.

Six flat sets train the base, three of them the VAE and the judge too; the 3D set is the style that users personalize
to, and no image of it is ever shown to the base or its VAE. Names, tags and groups come from emojibase.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import resvg_py
from PIL import Image

PACKAGES = {
    "noto": ("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "twemoji": ("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", "Apache-2.0"),
    "emojione": ("@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", "Apache-2.0"),
    "emojibase": ("emojibase-data@17.0.0", "MIT"),
    "fluent-3d": ("@lobehub/fluent-emoji-3d@1.1.0", "MIT"),
}
FLAT_STYLES = ("noto", "twemoji", "fluent-flat")
# More drawings of the same things, which only the UNet learns from: they teach it the thing instead of one picture.
MORE_STYLES = ("noto-v1", "emojione", "fxemoji")
SIZE = 64  # pixels, of the renders that train the base

# emojibase groups of things with a recognizable shape; people variants, symbols and flags are left out.
GROUPS = {3: "animals and plants", 4: "food and drink", 5: "places and travel", 6: "activities", 7: "objects"}
# Many near-identical drawings (clock faces, buildings, sunsets, moon phases) or drawings that are signs.
EXCLUDED_SUBGROUPS = {
    "time",
    "place-map",
    "place-building",
    "place-geographic",
    "place-other",
    "place-religious",
    "sky-weather",
    "event",
    "award-medal",
    "mail",
    "office",
    "writing",
    "money",
    "hotel",
    "music",
    "sound",
}


@dataclass(frozen=True)
class Concept:
    """One thing that can be drawn, with the SVG text of each of FLAT_STYLES and of MORE_STYLES that has it."""

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: int
    subgroup: str
    order: int
    version: float
    flat_svgs: dict[str, str] = field(repr=False)
    image_3d: Path | None
    more_svgs: dict[str, str] = field(default_factory=dict, repr=False)


def fetch(work: Path) -> dict[str, Path]:
    """Download each npm package once into `work`; returns the folder of each. Raises FileNotFoundError without npm."""
    return {name: _fetched(work, name, package) for name, (package, _licence) in PACKAGES.items()}


def drawn_by_another(work: Path, name: str, package: str) -> dict[str, str]:
    """The SVG texts of one more set, which trains nothing here, by the hexcodes of the concepts that it draws.

    The package is fetched as the others are; icons are matched by noto's names.
    """
    svgs = _svgs_by_name(_fetched(work, name, package))
    names = _names_by_code(_fetched(work, "noto", PACKAGES["noto"][0]))
    return {code: svgs[_letters(name)] for code, name in names.items() if _letters(name) in svgs}


def load_concepts(work: Path) -> list[Concept]:
    """Every non-flag emoji without skin tones that at least one flat style draws, in emojibase's order."""
    folders = fetch(work)
    meta = json.loads((folders["emojibase"] / "meta" / "groups.json").read_text(encoding="utf-8"))
    svgs = {style: _svgs_by_code(folders[style]) for style in FLAT_STYLES}
    more = {style: _svgs_by_name(folders[style]) for style in MORE_STYLES}
    names = {code: _letters(name) for code, name in _names_by_code(folders["noto"]).items()}
    images_3d = {_code(path.stem): path for path in (folders["fluent-3d"] / "assets").glob("*.webp")}
    concepts = []
    for entry in json.loads((folders["emojibase"] / "en" / "data.json").read_text(encoding="utf-8")):
        code = _code(entry["hexcode"])
        flat = {style: svgs[style][code] for style in FLAT_STYLES if code in svgs[style]}
        if "group" not in entry or entry["group"] in (2, 9) or not flat:
            continue
        drawn_by = {style: svg for style in MORE_STYLES if (svg := more[style].get(names.get(code, "")))}
        concepts.append(
            Concept(
                hexcode=code,
                name=entry["label"].lower(),
                tags=tuple(tag.lower() for tag in entry.get("tags", ())),
                group=entry["group"],
                subgroup=meta["subgroups"][str(entry["subgroup"])],
                order=entry["order"],
                version=entry["version"],
                flat_svgs=flat,
                image_3d=images_3d.get(code),
                more_svgs=drawn_by,
            )
        )
    return sorted(concepts, key=lambda concept: concept.order)


def recognizable(concepts: list[Concept]) -> list[Concept]:
    """All concepts with a shape that tells what they are: what the base is trained on."""
    return [c for c in concepts if c.group in GROUPS and c.subgroup not in EXCLUDED_SUBGROUPS]


def choose_concepts(concepts: list[Concept], count: int) -> list[Concept]:
    """The `count` best known concepts: drawn in all four styles, oldest emoji versions first.

    Two thirds are animals, plants and food; the other groups share the rest.
    """
    drawn = (c for c in recognizable(concepts) if len(c.flat_svgs) == len(FLAT_STYLES))
    usable = [c for c in drawn if c.image_3d is not None]
    share = {3: 0.35, 4: 0.3, 5: 0.1, 6: 0.1, 7: 0.15}
    chosen: list[Concept] = []
    for group, fraction in share.items():
        members = sorted((c for c in usable if c.group == group), key=lambda c: (c.version, c.order))
        chosen += members[: round(count * fraction)]
    return sorted(chosen, key=lambda concept: concept.order)


def render(svg: str, size: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One SVG on white as (size, size, 3) uint8."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return _on_white(Image.open(io.BytesIO(png)).convert("RGBA"), size)


def load_3d(path: Path, size: int = SIZE) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One 3D icon on white as (size, size, 3) uint8."""
    with Image.open(path) as image:
        return _on_white(image.convert("RGBA"), size)


def _fetched(work: Path, name: str, package: str) -> Path:
    folder = work / "npm" / name
    if not (folder / "package" / "package.json").exists():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("npm is needed to fetch the icon packages; install Node.js and run again")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([npm, "pack", package, "--silent", "--pack-destination", str(folder)], check=True)
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    return folder / "package"


def _on_white(image: Image.Image, size: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    canvas = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return np.asarray(canvas.resize((size, size), Image.Resampling.LANCZOS) if canvas.size != (size, size) else canvas)


def _svgs_by_code(folder: Path) -> dict[str, str]:
    svgs = _svgs(folder)
    return {code: svgs[name] for code, name in _names_by_code(folder).items() if name in svgs}


def _svgs_by_name(folder: Path) -> dict[str, str]:
    """Of a set without code points: by the letters of the name, which the sets hyphenate each in its own way."""
    return {_letters(name): svg for name, svg in _svgs(folder).items()}


def _names_by_code(folder: Path) -> dict[str, str]:
    chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
    return {_code(code): name for code, name in chars.items()}


def _svgs(folder: Path) -> dict[str, str]:
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    width, height = icons.get("width", 16), icons.get("height", 16)
    svgs = {}
    for name, icon in icons["icons"].items():
        box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}">'
        svgs[name] = svg + icon["body"] + "</svg>"
    return svgs


def _letters(name: str) -> str:
    return "".join(letter for letter in name if letter.isalnum())


def _code(text: str) -> str:
    """A code point sequence as a key that all four packages share: upper case, no variation selector, no padding."""
    return "-".join(part.lstrip("0") for part in text.upper().split("-") if part != "FE0F")
