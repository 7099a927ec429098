"""The form of a training, made from the settings' own definition: a component for each, with its help and bounds."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from flatlora_diffusion.config import (
    INCLUDED_BASES,
    KLEIN,
    SDXL,
    TINY,
    TINY_KLEIN,
    ConfigError,
    TrainConfig,
    choices_of,
    for_method,
    help_of,
    preset_file,
    setting_hints,
)
from flatlora_diffusion.storage.model_paths import available_bases

from ..uploads.captions import TRIGGER
from .labels import DECIDED_BY_THE_APP, HINTS, LABELS, with_labels

PRESETS = {
    "Quick look": "demo",
    "Paper": "paper",
    "Low memory": "low_memory",
    "Quality": "quality",
    "Illustrious": "illustrious",
    "FLUX.2 klein": "klein",
}
_BASE = "pretrained_model_name_or_path"
_BASES = {
    TINY: "tiny: the demo base, an SDXL",
    TINY_KLEIN: "tiny_klein: a small FLUX.2 klein",
    SDXL: SDXL,
    KLEIN: KLEIN,
}
# How the images look to the trainer: these stand beside the images.
PLACED_WITH_THE_IMAGES = ("background_color", "use_aspect_ratio_buckets")
# Of the app alone: often enough to go on from, and to compare by checkpoint.
_OF_PRESET: dict[str, dict[str, Any]] = {"Quick look": {"checkpointing_steps": 50}}
_THINGS = ("a tomato", "a penguin", "a violin")  # none of the sample icons
_START = {
    "validation_prompt": "\n".join(f"a {TRIGGER} icon of {thing}, in the style of {TRIGGER}" for thing in _THINGS),
    "num_validation_images": 1,
    "validation_epochs": 5,
    "report_to": "none",
}


class ConfigForm:
    """A component for each setting of a TrainConfig. They are placed by whoever renders them."""

    def __init__(self) -> None:
        start = preset_settings("Quick look", {})
        hints = setting_hints()
        self._hints = hints
        self.sections: dict[str, list[str]] = {}
        self.by_name: dict[str, gr.components.Component] = {}
        for title, section in _sections():
            items = [item for item in dataclasses.fields(section) if item.name not in DECIDED_BY_THE_APP]
            self.sections[title] = [item.name for item in items]
            for item in items:
                self.by_name[item.name] = _component(item, hints[item.name], start[item.name])

    @property
    def components(self) -> list[gr.components.Component]:
        """All components, in the order of `read` and `write`."""
        return list(self.by_name.values())

    def read(self, values: Sequence[Any], method: str) -> TrainConfig:
        """The config of the components' values for a method, without the settings of other methods.

        Raises ConfigError for a value that is not allowed.
        """
        named = zip(self.by_name, values, strict=True)
        read = {name: _setting(name, value, self._hints[name]) for name, value in named}
        return TrainConfig.from_dict(read | for_method(method))

    def write(self, settings: Mapping[str, Any]) -> list[Any]:
        """The components' values for `settings`, over the defaults."""
        filled = TrainConfig().to_dict() | dict(settings)
        return [_shown(filled[name], self._hints[name]) for name in self.by_name]


def preset_settings(preset: str, current: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a preset, its method too; it keeps the base, size and images of `current` but for its own."""
    kept = (_BASE, "resolution", "validation_prompt", "background_color", "seed")
    values = json.loads(preset_file(PRESETS[preset]).read_text(encoding="utf-8"))
    mine = {name: value for name, value in values.items() if name not in ("instance_data_dir", "output_dir")}
    carried = {name: current[name] for name in kept if name in current}
    return TrainConfig().to_dict() | _START | carried | mine | _OF_PRESET.get(preset, {})


def base_choices() -> list[tuple[str, str]]:
    """(label, value) of the bases to choose from, without an included base that has no weights here."""
    missing = INCLUDED_BASES.keys() - set(available_bases())
    return [(label, value) for value, label in _BASES.items() if value not in missing]


def _sections() -> list[tuple[str, type]]:
    hints = typing.get_type_hints(TrainConfig)
    return [
        ((hints[item.name].__doc__ or item.name).rstrip("."), hints[item.name])
        for item in dataclasses.fields(TrainConfig)
    ]


def _component(item: dataclasses.Field[Any], hint: Any, value: Any) -> gr.components.Component:
    """Bounds are shown here and checked by the config, whose error names the setting."""
    place = {
        "label": LABELS[item.name],
        "info": with_labels(HINTS.get(item.name, help_of(item, hint))) + _bounds(item),
        "elem_id": f"setting-{item.name}",
        "render": False,
    }
    kind, is_optional = _kind(hint)
    shown = _shown(value, hint)
    if item.name == _BASE:
        return gr.Dropdown(base_choices(), value=shown, allow_custom_value=True, **place)
    if choices_of(hint):
        choices = [("default", "")] if is_optional else []
        return gr.Dropdown([*choices, *((choice, choice) for choice in choices_of(hint))], value=shown, **place)
    if kind is bool:
        return gr.Checkbox(value=shown, **place)
    if kind in (int, float) and is_optional:  # an empty gr.Number comes back from the browser as 0
        return gr.Textbox(value=shown, max_lines=1, placeholder="default", **place)
    if kind in (int, float):
        return gr.Number(value=shown, step=1 if kind is int else None, **place)
    lines = (3, 6) if item.metadata.get("is_multiline") else (1, 1)
    return gr.Textbox(value=shown, lines=lines[0], max_lines=lines[1], **place)


def _bounds(item: dataclasses.Field[Any]) -> str:
    low, high = item.metadata["min"], item.metadata["max"]
    if low is None:
        return ""
    return f"; {low} or more" if high is None else f"; {low} to {high}"


def _kind(hint: Any) -> tuple[Any, bool]:
    kinds = typing.get_args(hint) if type(None) in typing.get_args(hint) else (hint,)
    return next(kind for kind in kinds if kind is not type(None)), type(None) in kinds


def _setting(name: str, value: Any, hint: Any) -> Any:
    kind, is_optional = _kind(hint)
    if is_optional and isinstance(value, str):
        value = value.strip()
        if not value:
            return None
        if kind in (int, float):
            value = _number(name, value)
    return int(value) if kind is int and isinstance(value, float) and value.is_integer() else value


def _number(name: str, text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} must be a number; leave it empty for the default") from error


def _shown(value: Any, hint: Any) -> Any:
    """Optional settings without choices are text, empty for the default."""
    kind, is_optional = _kind(hint)
    if value is None:
        return ""
    return repr(value) if is_optional and kind is float else str(value) if is_optional and kind is int else value
