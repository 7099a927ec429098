"""The verbs on LoRA files: export, import, merge, resize, average, extract, inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatlora_diffusion.commands.help_page import Page
from flatlora_diffusion.commands.verb_settings import hide_library_bars, say_base, verb_settings
from flatlora_diffusion.config import (
    AverageConfig,
    ExportConfig,
    ExtractConfig,
    ImportConfig,
    InspectConfig,
    MergeConfig,
    ModelConfig,
    ResizeConfig,
)
from flatlora_diffusion.lora_files.paths import lora_file, parse_lora
from flatlora_diffusion.storage.model_paths import check_base

if TYPE_CHECKING:
    from flatlora_diffusion.lora_tools.converting import WrittenFile
    from flatlora_diffusion.lora_tools.resizing import ReducedFile


def export_verb(arguments: list[str]) -> None:
    page = Page("export", "Write a LoRA file of any layout for other programs.", "FILE", "file")
    config = verb_settings(ExportConfig(), page, arguments)
    _check_read(config)
    from flatlora_diffusion.lora_tools.converting import export_lora

    for written in export_lora(config):
        _say_written(written)


def import_verb(arguments: list[str]) -> None:
    page = Page("import", "Write a LoRA file of any layout for diffusers.", "FILE", "file")
    config = verb_settings(ImportConfig(), page, arguments)
    _check_read(config)
    from flatlora_diffusion.lora_tools.converting import import_file

    for written in import_file(config):
        _say_written(written)


def merge_verb(arguments: list[str]) -> None:
    text = "Add LoRAs to a base's weights: a diffusers folder, or one checkpoint file for all web UIs."
    page = Page("merge", text, "--base BASE --lora LORA --output OUTPUT")
    config = verb_settings(MergeConfig(), page, arguments)
    if config.base:
        check_base("base", config.base)
    for lora in config.lora:
        parse_lora(lora)
    _say_base(config.base)
    from flatlora_diffusion.lora_tools.merging import merge_loras

    hide_library_bars()
    print(f"merged model saved in {merge_loras(config)}")


def resize_verb(arguments: list[str]) -> None:
    page = Page("resize", "Write the best LoRA of a lower rank.", "FILE", "file")
    config = verb_settings(ResizeConfig(), page, arguments)
    _check_read(config)
    from flatlora_diffusion.lora_tools.resizing import resize_lora

    _say_reduced(resize_lora(config))


def average_verb(arguments: list[str]) -> None:
    page = Page("average", "Write the average of several LoRAs of one base as one LoRA.", "LORA ...", "loras")
    config = verb_settings(AverageConfig(), page, arguments)
    for lora in config.loras:
        lora_file(lora)
    if config.base is not None:
        check_base("base", config.base)
    from flatlora_diffusion.lora_tools.averaging import average_loras

    averaged = average_loras(config)
    _say_written(averaged.written)
    print(f"rank {averaged.rank}; lost by the cut: {100 * averaged.lost:.3g} % of the average (Frobenius norm)")
    if averaged.embeddings is not None:
        print(f"embeddings of the new tokens saved in {averaged.embeddings}")


def extract_verb(arguments: list[str]) -> None:
    page = Page("extract", "Write the difference of two models as a LoRA.", "--base BASE --tuned TUNED")
    config = verb_settings(ExtractConfig(), page, arguments)
    for name in ("base", "tuned"):
        if base := getattr(config, name):
            check_base(name, base)
    _say_base(config.base)
    from flatlora_diffusion.lora_tools.resizing import extract_lora

    hide_library_bars()
    _say_reduced(extract_lora(config))


def inspect_verb(arguments: list[str]) -> None:
    page = Page("inspect", "Show what is in a LoRA file and which tools read it.", "FILE", "file")
    config = verb_settings(InspectConfig(), page, arguments)
    _check_read(config)
    from flatlora_diffusion.lora_tools.inspecting import inspect_lora

    print(inspect_lora(config))


def _check_read(config: ExportConfig | ImportConfig | ResizeConfig | InspectConfig) -> None:
    """A wrong path is told before torch is imported, which takes seconds."""
    lora_file(config.file)
    if config.base is not None:
        check_base("base", config.base)


def _say_base(name: str) -> None:
    if name:  # that none is given is told later
        say_base(ModelConfig(pretrained_model_name_or_path=name), has_remedy=False)


def _say_written(written: WrittenFile) -> None:
    print(f"LoRA saved in {written.path}; largest error of a layer by rounding: {written.error:.2g} of its update")


def _say_reduced(reduced: ReducedFile) -> None:
    _say_written(reduced.written)
    print(f"missed by the lower rank: {100 * reduced.missed:.3g} % of the whole change (Frobenius norm)")
