"""Which of SDXL's family a base is: by the marks in its file, by its name, and by the shapes of its tensors.

Weights do not tell epsilon from velocity. Who trained a base on velocity adds the tensors `v_pred` and, for zero
terminal SNR, `ztsnr` to its file, which ComfyUI and Forge look for; some say it in the file's metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from flatlora_diffusion.config import ConfigError, ModelConfig, PredictionType
from flatlora_diffusion.sdxl.objective import is_edm_scheduler
from flatlora_diffusion.sdxl.single_file import PREFIXES

_PARTS = {
    "UNet": (f"{PREFIXES['unet']}label_emb.",),
    "first text encoder": (PREFIXES["text_encoder"],),
    "second text encoder": (PREFIXES["text_encoder_2"],),
    "VAE": (PREFIXES["vae"], "vae."),
}
_FIRST_LAYER = f"{PREFIXES['unet']}input_blocks.0.0.weight"
# As people name them, the more special before what it was made of.
_NAMES = {
    "Playground": "playground",
    "NoobAI": "noob",
    "Illustrious": r"illustrious|\bilxl|ilxl\b",
    "Pony": r"pony(?!tail)",
}
_DISTILLED = {
    "Turbo": "turbo",
    "Lightning": "lightning",
    "LCM": r"(?<![a-z])lcm",
    "Hyper": r"hyper[-_]?sd",
    "DMD": "dmd2",
}
_SAYS_V = re.compile(r"v[-_ ]?pred")


@dataclass(frozen=True)
class Header:
    """What a checkpoint file says without its weights being read: tensors by name with their shapes, metadata."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A base of SDXL's family.

    prediction_type, zero_terminal_snr: what it was trained on as far as its file says so, `source` where; None where
    its scheduler has to say it. is_edm: by its marks it was trained as Playground v2.5. few_steps: what distilled it,
    and is_called_v: that it predicts velocity, both by its name alone.
    """

    name: str = "SDXL"
    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool = False
    source: str = ""
    is_edm: bool = False
    few_steps: str | None = None
    is_called_v: bool = False


def read_header(file: Path) -> Header:
    """Raises OSError or SafetensorError for a file that is damaged."""
    with safe_open(file, framework="pt") as checkpoint:
        shapes = {name: tuple(checkpoint.get_slice(name).get_shape()) for name in checkpoint.keys()}  # noqa: SIM118
        return Header(shapes, dict(checkpoint.metadata() or {}))


def check_whole(header: Header, what: str, has_vae: bool) -> None:
    """Raises ConfigError for a file that is of another family, lacks a model of SDXL or is no base.

    `what` names the file, `has_vae` says that another VAE is given.
    """
    names = header.shapes
    if "edm_vpred.sigma_max" in names:
        raise ConfigError(f"{what} is CosXL, which predicts velocity at EDM's noise levels and cannot be trained here")
    lacks = {part for part, starts in _PARTS.items() if not any(name.startswith(starts) for name in names)}
    if "first text encoder" in lacks and any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise ConfigError(f"{what} is SDXL's refiner, which has the second text encoder only; give the base")
    if has_vae:
        lacks.discard("VAE")
    if lacks == {"VAE"}:
        raise ConfigError(f"{what} has no VAE; give one with --pretrained_vae_model_name_or_path")
    if lacks:
        parts = ", ".join(f"no {part} of SDXL" for part in _PARTS if part in lacks)
        raise ConfigError(f"{what} is not SDXL, or not all of it: it has {parts}; give a whole SDXL checkpoint")
    check_channels(names[_FIRST_LAYER][1] if _FIRST_LAYER in names else 4, 4, what)


def check_channels(channels: int, latents: int, what: str) -> None:
    """Raises ConfigError for a UNet that takes more than the `latents` channels of an image."""
    if channels != latents:
        raise ConfigError(
            f"{what} is no SDXL base: its UNet takes {channels} channels, not the {latents} of an image alone, as "
            "models for inpainting and editing do; give the base that it was made from"
        )


def variant_of(name_or_path: str, header: Header) -> Variant:
    """The variant of a base with this hub id or path; `header` is empty for one that is no file."""
    said = " ".join([re.split(r"[\\/]", name_or_path.rstrip("\\/"))[-1], header.metadata.get("modelspec.title", "")])
    said = said.lower()
    is_edm = {"edm_mean", "edm_std"} <= header.shapes.keys()
    prediction, zero_snr, source = _marks(header)
    return Variant(
        name="Playground" if is_edm else _found(_NAMES, said) or "SDXL",
        prediction_type=prediction,
        zero_terminal_snr=zero_snr,
        source=source,
        is_edm=is_edm,
        few_steps=_found(_DISTILLED, said),
        is_called_v=_SAYS_V.search(said) is not None,
    )


def scheduler_changes(variant: Variant, config: ModelConfig, scheduler: Any, what: str) -> dict[str, Any]:
    """What the scheduler of the base has to be told. Given, --prediction_type says all, and the marks say nothing.

    Raises ConfigError for zero terminal SNR on a base that predicts the noise.
    """
    prediction = config.prediction_type or variant.prediction_type
    zero_snr = config.zero_terminal_snr or (config.prediction_type is None and variant.zero_terminal_snr)
    changes: dict[str, Any] = {} if prediction is None else {"prediction_type": prediction}
    if zero_snr:
        predicts = prediction or scheduler.config.prediction_type
        if predicts != "v_prediction":
            raise ConfigError(
                f"zero_terminal_snr needs a v-prediction base, but {what} predicts {predicts}; "
                "leave it out, or give --prediction_type v_prediction if the base was trained so"
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def description(variant: Variant, config: ModelConfig, scheduler: Any) -> str:
    """The variant, what it predicts and who says so, in a line. `scheduler` is the changed one."""
    name = variant.name if variant.few_steps is None else f"{variant.name} {variant.few_steps}"
    if is_edm_scheduler(scheduler):
        return f"the base is {name} with EDM's noise levels (its scheduler)"
    kind = "v-prediction" if scheduler.config.prediction_type == "v_prediction" else scheduler.config.prediction_type
    kind += " with zero terminal SNR" if scheduler.config.get("rescale_betas_zero_snr") else ""
    if config.prediction_type is None:
        by = variant.source or "its scheduler"
    else:
        by = "--prediction_type"
        if variant.prediction_type not in (None, config.prediction_type):
            by += f" over {variant.source}"
    return f"the base is {name}: {kind} (by {by})"


def doubts(variant: Variant, scheduler: Any) -> list[str]:
    """What to warn of, a sentence each. `scheduler` is the changed one."""
    found = []
    if variant.few_steps is not None:
        found.append(
            f"this base is distilled to draw in few steps ({variant.few_steps}, by its name), which training undoes, "
            "and its previews look burnt; train on the base that it was made of: the LoRA works on both"
        )
    if variant.is_called_v and not is_edm_scheduler(scheduler) and scheduler.config.prediction_type == "epsilon":
        found.append(
            "this base is trained as one that predicts the noise, but its name says v-prediction; if that is right, "
            "give --prediction_type v_prediction, and --zero_terminal_snr if it was trained with it"
        )
    return found


def _found(patterns: Mapping[str, str], said: str) -> str | None:
    return next((name for name, pattern in patterns.items() if re.search(pattern, said)), None)


def _marks(header: Header) -> tuple[PredictionType | None, bool, str]:
    """What the file says of its training: prediction type, zero terminal SNR, and where it says so."""
    marks = [name for name in ("v_pred", "ztsnr") if name in header.shapes]
    if "v_pred" in marks:
        return "v_prediction", "ztsnr" in marks, f"the marks {' and '.join(marks)} in its file"
    said = header.metadata
    kind = said.get("modelspec.prediction_type", "").lower()
    if kind in ("v", "v_prediction", "velocity") or said.get("ss_v_parameterization", "").lower() == "true":
        return "v_prediction", said.get("ss_zero_terminal_snr", "").lower() == "true", "the metadata of its file"
    return None, False, ""
