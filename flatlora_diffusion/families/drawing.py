"""Generation parameters of an image, for `Base.sample_latents` and for other tools."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from PIL.PngImagePlugin import PngInfo

from flatlora_diffusion.config import KLEIN, SDXL
from flatlora_diffusion.storage.versions import PROGRAM, __version__

PARAMETERS = "parameters"
NOISE_FROM = "CPU"  # A1111's name for noise from a CPU generator
# Names in ComfyUI and in A1111.
SAMPLERS = {
    "EulerDiscreteScheduler": ("euler", "Euler"),
    "EulerAncestralDiscreteScheduler": ("euler_ancestral", "Euler a"),
}
_KNOWN_BASES = {  # file names in other tools
    SDXL: "sd_xl_base_1.0",
    KLEIN: "flux-2-klein-base-4b",
    KLEIN.replace("-base", ""): "flux-2-klein-4b",
}


@dataclass(frozen=True)
class ImageSettings:
    """What an image depends on besides prompt and seed.

    resolution: side in pixels.
    steps, guidance: the family's defaults if None.
    rescale: guidance rescale; the base's default if None.
    """

    resolution: int
    steps: int | None = None
    guidance: float | None = None
    negative_prompt: str | None = None
    rescale: float | None = None


class Drawing(ABC):
    """An image as other tools reproduce it."""

    @abstractmethod
    def png_chunks(self) -> dict[str, str]:
        """Return the text chunks of a PNG that other tools read."""

    @abstractmethod
    def files(self) -> dict[str, str]:
        """Return the contents of workflow and parameter files by file suffix."""


def png_text(drawing: Drawing) -> PngInfo:
    """Return the PNG text chunks that other tools read."""
    text = PngInfo()
    add_drawing(text, drawing)
    return text


def add_drawing(text: PngInfo, drawing: Drawing) -> None:
    """Add the PNG text chunks that other tools read to `text`."""
    for name, value in drawing.png_chunks().items():
        text.add_text(name, value)


def portable_base_name(name: str | None) -> str:
    """Return the name of a base in other tools, without suffix, by its hub id or file name; BASE for None."""
    if name is None:
        return "BASE"
    return _KNOWN_BASES.get(name, name.rsplit("/", maxsplit=1)[-1].removesuffix(".safetensors"))


def a1111_text(
    prompt: str, negative_prompt: str | None, loras: Iterable[tuple[str, float]], values: Mapping[str, object]
) -> str:
    """Return A1111's parameters text of plain prompts, (name, strength) of LoRAs, and named values."""
    marks = "()[]"  # A1111 would interpret them as weights
    lines = [escaped(prompt, marks) + "".join(f" <lora:{name}:{strength:g}>" for name, strength in loras)]
    if negative_prompt:
        lines.append(f"Negative prompt: {escaped(negative_prompt, marks)}")
    values = {**values, "Version": f"{PROGRAM} {__version__}"}
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items()))
    return "\n".join(lines)


def a1111_sampler(kind: str) -> str:
    """Return A1111's name of a diffusers scheduler class; the class name without an equivalent."""
    return SAMPLERS[kind][1] if kind in SAMPLERS else kind.removesuffix("Scheduler")


def escaped(prompt: str, marks: str) -> str:
    """Return `prompt` with a backslash before each of `marks`."""
    return re.sub(f"([{re.escape(marks)}])", r"\\\1", prompt)


def _quoted(value: str) -> str:
    """Quote a value as A1111 does: as JSON if it contains a separator."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value
