"""Names of bases for lists and captions."""

from __future__ import annotations

from flatlora_diffusion.config import ModelConfig
from flatlora_diffusion.families.base_title import included_title
from flatlora_diffusion.gallery.png_text import bare_name


def base_name(name_or_path: str) -> str:
    """`the tiny demo base`, a hub id, or the last part of a path; empty for no base."""
    if not name_or_path:
        return ""
    return included_title(ModelConfig(name_or_path)) or bare_name(name_or_path)
