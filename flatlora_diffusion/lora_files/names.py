"""Maps the layer names of every LoRA layout in use to the layers of a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

from torch import nn

from flatlora_diffusion.config import DENOISERS, INCLUDED_BASES, SDXL, ModelConfig
from flatlora_diffusion.families.family import Family
from flatlora_diffusion.families.labels import Labels
from flatlora_diffusion.families.paths import config_file
from flatlora_diffusion.families.registry import check_kind, family_of, family_of_pipeline
from flatlora_diffusion.lora_files.scale import PEFT_PREFIX

Style = Literal["kohya-sgm", "kohya-diffusers", "comfyui", "lycoris", "peft", "diffusers-old", "processor"]
"""How a file names layers: kohya's names with SDXL's original or diffusers' blocks; ComfyUI's model names; LyCORIS's
`lycoris_`; PEFT's `lora_A`; diffusers' `to_q.lora.down` and `lora_linear_layer`; and its oldest,
`processor.to_q_lora.down`. The last three share their names and differ in the suffix."""
DIFFUSERS_STYLES: tuple[Style, ...] = ("peft", "diffusers-old", "processor")

_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Target(NamedTuple):
    """A layer of the base, and the style of the name that refers to it."""

    part: str
    module: str
    style: Style


@dataclass(frozen=True)
class BaseNames:
    """The layers of a base without weights: their shapes, and the names that files give them.

    Attributes:
        shapes: Weight shapes by part and module path.
        targets: Layers by name.
    """

    base: str
    family: Family
    denoiser: Any
    shapes: dict[str, dict[str, tuple[int, ...]]]
    targets: dict[str, Target]

    @property
    def labels(self) -> Labels:
        """The names of the base in LoRA files."""
        return self.family.labels(self.denoiser)

    def names_of(self, part: str, module: str) -> dict[str, Target]:
        """All names of a layer, or of a norm of the denoiser, mapped to their targets."""
        names = self.family.file_names(part, module, self.denoiser)
        return {name: Target(part, module, cast(Style, style)) for name, style in names.items()}

    def target(self, name: str, style: Style) -> Target | None:
        """Find the layer that a file in `style` calls `name`; None if this base has no such layer."""
        dotted = _dotted(name)
        target = (
            self.targets.get(name) or self.targets.get(dotted) or self.targets.get(f"{self.family.denoiser}.{dotted}")
        )
        if target is None or target.style != "peft":
            return target  # the name itself determines the style
        return Target(target.part, target.module, style)


def base_names(base: str | None = None) -> BaseNames:
    """Get the names of a base: a diffusers folder or an included base; its family's usual ones if it is not on disk.

    None is SDXL. Raises ConfigError if the base is of no family, or a config file of it is damaged.
    """
    config = ModelConfig(pretrained_model_name_or_path=base or SDXL)
    check_kind(config)
    family = family_of(config)
    name = config.pretrained_model_name_or_path
    if name == family.usual_base:
        name = family.name
    elif name not in INCLUDED_BASES and not Path(name).exists() and config_file(config, family.denoiser) is None:
        name = f"{family.name} ({name} is not on this disk)"
    return _names(name, family, {part: family.on_meta(config, part) for part in family.lora_parts})


def pipeline_names(pipeline: Any) -> BaseNames:
    """Get the names of a pipeline's layers, which must have no LoRA attached."""
    family = family_of_pipeline(pipeline)
    return _names("this base", family, {part: getattr(pipeline, part) for part in family.lora_parts})


def layer_shapes(part: str, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weight shapes of `adaptable_layers`."""
    return {module: _shape(layer) for module, layer in adaptable_layers(part, model).items()}


def adaptable_layers(part: str, model: nn.Module) -> dict[str, Any]:
    """Every linear layer and convolution by module path; text encoders' paths start with `text_model.`, whatever the
    version of transformers.
    """
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            is_complete = part in DENOISERS or name.startswith("text_model.") or name == "text_projection"
            layers[name if is_complete else f"text_model.{name}"] = layer
    return layers


def _names(base: str, family: Family, models: dict[str, Any]) -> BaseNames:
    shapes = {part: layer_shapes(part, model) for part, model in models.items()}
    denoiser = models[family.denoiser]
    names = BaseNames(base, family, denoiser, shapes, {})
    for part, layers in shapes.items():
        for module in layers:
            names.targets.update(names.names_of(part, module))
    return names


def _shape(layer: Any) -> tuple[int, ...]:
    # A quantized layer's weight is packed.
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def _dotted(name: str) -> str:
    """Normalize the several spellings of diffusers and PEFT to `unet.….attn1.to_out.0`."""
    name = name.replace(PEFT_PREFIX, "", 1)
    head, _, leaf = name.rpartition(".")
    if head.startswith("text_encoder") and leaf in _OLD_TEXT:
        return f"{head}.{_OLD_TEXT[leaf]}"
    if head.endswith(".processor"):
        return f"{head.removesuffix('.processor')}.{'to_out.0' if leaf == 'to_out' else leaf}"
    return name
