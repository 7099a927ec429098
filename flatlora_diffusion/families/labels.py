"""The names of a base in LoRA files."""

from __future__ import annotations

from typing import NamedTuple


class Labels(NamedTuple):
    """A base's name in messages, `ss_base_model_version`, `modelspec.architecture` and a sidecar file.

    is_demo: whether it is a tiny base of this program, which other tools do not have.
    is_flow: whether it is trained by flow matching, so that the metadata of noise prediction do not apply.
    implementation: the base's code, `modelspec.implementation`.
    tag: its tag on the hub.
    programs: programs that read its LoRAs.
    """

    name: str
    version: str
    architecture: str
    sidecar: str
    is_demo: bool = False
    is_flow: bool = False
    implementation: str = "https://github.com/Stability-AI/generative-models"
    tag: str = "stable-diffusion-xl"
    programs: str = "ComfyUI, Forge, AUTOMATIC1111, InvokeAI or another program for SDXL"
