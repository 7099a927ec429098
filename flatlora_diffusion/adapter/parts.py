"""The parts of a pipeline that a LoRA can change."""

from __future__ import annotations

from typing import Any

from flatlora_diffusion.config import DENOISERS, TEXT_PARTS

PARTS = (*DENOISERS, *TEXT_PARTS)  # of any family; a pipeline has some of them


def parts_of(pipeline: Any) -> tuple[str, ...]:
    """The parts of a pipeline that a LoRA can change, the denoiser first."""
    return tuple(part for part in PARTS if getattr(pipeline, part, None) is not None)


def denoiser_of(pipeline: Any) -> str:
    """The name of the denoiser in a pipeline."""
    return next(part for part in DENOISERS if hasattr(pipeline, part))
