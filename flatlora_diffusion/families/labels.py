"""The names of a base in LoRA files."""

from __future__ import annotations

from typing import NamedTuple


class Labels(NamedTuple):
    """A base's name in messages, `ss_base_model_version`, `modelspec.architecture` and a sidecar file.

    is_demo: whether it is a tiny base of this program, which other tools do not have.
    """

    name: str
    version: str
    architecture: str
    sidecar: str
    is_demo: bool = False
