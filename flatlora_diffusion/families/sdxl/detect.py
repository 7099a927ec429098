"""Detection of SDXL variants by marker tensors, names and tensor shapes of a base.

The weights do not show whether a base predicts epsilon or velocity. Files of v-prediction bases have the marker
tensors `v_pred` and, for zero terminal SNR, `ztsnr`, as ComfyUI and Forge expect, or an entry in the metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from flatlora_diffusion.config import ConfigError, ModelConfig, PredictionType
from flatlora_diffusion.families.sdxl.objective import is_edm_scheduler
from flatlora_diffusion.families.sdxl.single_file import PREFIXES

_PARTS = {
    "UNet": (f"{PREFIXES['unet']}label_emb.",),
    "first text encoder": (PREFIXES["text_encoder"],),
    "second text encoder": (PREFIXES["text_encoder_2"],),
    "VAE": (PREFIXES["vae"], "vae."),
}
_FIRST_LAYER = f"{PREFIXES['unet']}input_blocks.0.0.weight"
# Patterns of names; a derived model before the model that it is based on.
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
_V_NAME = re.compile(r"v[-_ ]?pred")


@dataclass(frozen=True)
class Header:
    """The tensor shapes by name and the metadata of a checkpoint file."""

    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """A variant of SDXL.

    prediction_type, zero_terminal_snr: as the file says, None if only the scheduler has them; `source` says where.
    is_edm: the file has the marker tensors of Playground v2.5.
    few_steps, name_says_v: distillation method and v-prediction, by the name only.
    """

    name: str = "SDXL"
    prediction_type: PredictionType | None = None
    zero_terminal_snr: bool = False
    source: str = ""
    is_edm: bool = False
    few_steps: str | None = None
    name_says_v: bool = False


def read_header(file: Path) -> Header:
    """Read the header of a file. Raises OSError or SafetensorError if it is damaged."""
    with safe_open(file, framework="pt") as checkpoint:
        shapes = {name: tuple(checkpoint.get_slice(name).get_shape()) for name in checkpoint.keys()}  # noqa: SIM118
        return Header(shapes, dict(checkpoint.metadata() or {}))


def check_complete(header: Header, what: str, has_vae: bool) -> None:
    """Raise ConfigError for a file that is not a complete SDXL base.

    Args:
        what: the file's name in messages.
        has_vae: whether another VAE is given.
    """
    names = header.shapes
    if "edm_vpred.sigma_max" in names:
        raise ConfigError(f"{what} is CosXL, which predicts velocity at EDM's noise levels and cannot be trained")
    missing = {part for part, starts in _PARTS.items() if not any(name.startswith(starts) for name in names)}
    if "first text encoder" in missing and any(name.startswith("conditioner.embedders.0.model.") for name in names):
        raise ConfigError(f"{what} is SDXL's refiner, which has the second text encoder only; give the base")
    if has_vae:
        missing.discard("VAE")
    if missing == {"VAE"}:
        raise ConfigError(f"{what} has no VAE; give one with --pretrained_vae_model_name_or_path")
    if missing:
        parts = ", ".join(f"no {part} of SDXL" for part in _PARTS if part in missing)
        raise ConfigError(f"{what} is not a complete SDXL checkpoint: it has {parts}; give a complete checkpoint")
    check_channels(names[_FIRST_LAYER][1] if _FIRST_LAYER in names else 4, 4, what)


def check_channels(channels: int, latents: int, what: str) -> None:
    """Raise ConfigError for a UNet with other input channels than the `latents` channels of an image."""
    if channels != latents:
        raise ConfigError(
            f"{what} is not an SDXL base: its UNet has {channels} input channels, not {latents}, as in models for "
            "inpainting and editing; give the base that it was made from"
        )


def variant_of(name_or_path: str, header: Header) -> Variant:
    """Detect the variant of a base by its hub id or path and its header, which is empty unless it is a file."""
    name = re.split(r"[\\/]", name_or_path.rstrip("\\/"))[-1]
    title = f"{name} {header.metadata.get('modelspec.title', '')}".lower()
    is_edm = {"edm_mean", "edm_std"} <= header.shapes.keys()
    prediction, zero_snr, source = _marks(header)
    return Variant(
        name="Playground" if is_edm else _first_match(_NAMES, title) or "SDXL",
        prediction_type=prediction,
        zero_terminal_snr=zero_snr,
        source=source,
        is_edm=is_edm,
        few_steps=_first_match(_DISTILLED, title),
        name_says_v=_V_NAME.search(title) is not None,
    )


def scheduler_changes(variant: Variant, config: ModelConfig, scheduler: Any, what: str) -> dict[str, Any]:
    """Return the settings to change in the base's scheduler; --prediction_type overrides the markers in the file.

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
                "leave it out, or give --prediction_type v_prediction if that is wrong"
            )
        changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return changes


def describe_variant(variant: Variant, config: ModelConfig, scheduler: Any) -> str:
    """Describe the variant, its prediction type and the source of that; `scheduler` has the changes applied."""
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


def variant_warnings(variant: Variant, scheduler: Any) -> list[str]:
    """Return warnings about the base; `scheduler` has the changes applied."""
    warnings = []
    if variant.few_steps is not None:
        warnings.append(
            f"this base is distilled for few steps ({variant.few_steps}, by its name): training undoes that, and its "
            "previews look overexposed; train on the base that it was made from, the LoRA works on both"
        )
    if variant.name_says_v and not is_edm_scheduler(scheduler) and scheduler.config.prediction_type == "epsilon":
        warnings.append(
            "this base is trained with epsilon prediction, but its name says v-prediction; if the name is right, give "
            "--prediction_type v_prediction, and --zero_terminal_snr if the base was trained with it"
        )
    return warnings


def _first_match(patterns: Mapping[str, str], title: str) -> str | None:
    return next((name for name, pattern in patterns.items() if re.search(pattern, title)), None)


def _marks(header: Header) -> tuple[PredictionType | None, bool, str]:
    """Return the prediction type and zero terminal SNR in the file, and where they are stated."""
    marks = [name for name in ("v_pred", "ztsnr") if name in header.shapes]
    if "v_pred" in marks:
        return "v_prediction", "ztsnr" in marks, f"the marks {' and '.join(marks)} in its file"
    metadata = header.metadata
    kind = metadata.get("modelspec.prediction_type", "").lower()
    if kind in ("v", "v_prediction", "velocity") or metadata.get("ss_v_parameterization", "").lower() == "true":
        return "v_prediction", metadata.get("ss_zero_terminal_snr", "").lower() == "true", "the metadata of its file"
    return None, False, ""
