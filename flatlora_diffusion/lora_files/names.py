"""The names that a base's layers have in the layouts that are in use, and the layer that each name means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from flatlora_diffusion.adapter.delta import PARTS
from flatlora_diffusion.config import SDXL, TINY, ModelConfig
from flatlora_diffusion.lora_files.kohya import KOHYA_PREFIXES
from flatlora_diffusion.lora_files.scale import PEFT_PREFIX
from flatlora_diffusion.sdxl.sgm_names import original_path
from flatlora_diffusion.sdxl.shapes import config_file, on_meta

Style = Literal["kohya-sgm", "kohya-diffusers", "comfyui", "lycoris", "peft", "diffusers-old", "processor"]
"""How a file names layers: kohya's names with SDXL's own blocks or with diffusers' blocks; those of ComfyUI's models;
LyCORIS's `lycoris_`; PEFT's `lora_A`; diffusers' `to_q.lora.down` and `lora_linear_layer`; and its oldest,
`processor.to_q_lora.down`. The last three have the same names and are told by their ends."""
DIFFUSERS_STYLES: tuple[Style, ...] = ("peft", "diffusers-old", "processor")

_COMFYUI_TEXT = {"text_encoder": "text_encoders.clip_l.", "text_encoder_2": "text_encoders.clip_g."}
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Place(NamedTuple):
    """A layer of the base, and the style of the name by which it was found."""

    part: str
    module: str
    style: Style


@dataclass(frozen=True)
class BaseNames:
    """The layers of a base: no weights, only their shapes and the names that files give them."""

    base: str
    unet: nn.Module
    shapes: dict[str, dict[str, tuple[int, ...]]]
    places: dict[str, Place]
    layers_per_block: int

    def place(self, name: str, style: Style) -> Place | None:
        """The layer that a file in `style` calls `name`; None for one that this base has not."""
        dotted = _dotted(name)
        place = self.places.get(name) or self.places.get(dotted) or self.places.get(f"unet.{dotted}")
        if place is None or place.style != "peft":
            return place  # the name itself tells the style
        return Place(place.part, place.module, style)


def base_names(base: str | None = None) -> BaseNames:
    """The names of a base: a diffusers folder, `tiny`, or SDXL's own for None and whatever is not on this disk."""
    config = ModelConfig(pretrained_model_name_or_path=base or SDXL)
    name = config.pretrained_model_name_or_path
    if name == SDXL:
        name = "SDXL"
    elif name != TINY and not Path(name).exists() and config_file(config, "unet") is None:
        name = f"SDXL (of {name} nothing is on this disk)"
    return _names(name, {part: on_meta(config, part) for part in PARTS})


def tiny_names() -> BaseNames:
    """The names of the base that ships with this program."""
    return base_names(TINY)


def loaded_names(pipeline: Any) -> BaseNames:
    """The names of a pipeline's layers, which must have no LoRA on them."""
    return _names("this base", {part: getattr(pipeline, part) for part in PARTS})


def layer_shapes(part: str, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weight's shape of every linear layer and convolution, by its path in all versions of transformers."""
    return {module: _shape(layer) for module, layer in shared_layers(part, model).items()}


def shared_layers(part: str, model: nn.Module) -> dict[str, Any]:
    """Every linear layer and convolution by that path: in text encoders with `text_model.` in front of the layers."""
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            is_shared = part == "unet" or name.startswith("text_model.") or name == "text_projection"
            layers[name if is_shared else f"text_model.{name}"] = layer
    return layers


def _names(base: str, models: dict[str, Any]) -> BaseNames:
    shapes = {part: layer_shapes(part, model) for part, model in models.items()}
    layers_per_block = models["unet"].config.layers_per_block
    places: dict[str, Place] = {}
    for part, layers in shapes.items():
        for module in layers:
            places |= names_of(part, module, layers_per_block)
    return BaseNames(base, models["unet"], shapes, places, layers_per_block)


def names_of(part: str, module: str, layers_per_block: int) -> dict[str, Place]:
    """All names of a layer, or of a norm of the UNet, each with the place that it means."""
    flat = module.replace(".", "_")
    if part != "unet":
        short = module.removeprefix("text_model.")
        names: dict[str, Style] = {
            f"{KOHYA_PREFIXES[part]}_{flat}": "kohya-sgm",  # the same in both of kohya's styles
            f"{KOHYA_PREFIXES[part]}_{short.replace('.', '_')}": "kohya-sgm",
            f"{_COMFYUI_TEXT[part]}transformer.{module}": "comfyui",
            f"{part}.{module}": "peft",
            f"{part}.{short}": "peft",
        }
    else:
        own = original_path(module, layers_per_block)
        names = {
            f"{KOHYA_PREFIXES[part]}_{flat}": "kohya-diffusers",
            f"{KOHYA_PREFIXES[part]}_{own.replace('.', '_')}": "kohya-sgm",
            f"diffusion_model.{own}": "comfyui",
            f"lycoris_{flat}": "lycoris",
            f"unet.{module}": "peft",
        }
    return {name: Place(part, module, style) for name, style in names.items()}


def _shape(layer: Any) -> tuple[int, ...]:
    # A quantized layer's weight is packed.
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def _dotted(name: str) -> str:
    """`unet.….attn1.to_out.0` from the several ways in which diffusers and PEFT have written it."""
    name = name.replace(PEFT_PREFIX, "", 1)
    head, _, leaf = name.rpartition(".")
    if head.startswith("text_encoder") and leaf in _OLD_TEXT:
        return f"{head}.{_OLD_TEXT[leaf]}"
    if head.endswith(".processor"):
        return f"{head.removesuffix('.processor')}.{'to_out.0' if leaf == 'to_out' else leaf}"
    return name
