"""The verbs on LoRA files: export, import, merge, resize, average, extract, inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatlora_diffusion.commands.help_page import HelpPage
from flatlora_diffusion.commands.verb_settings import hide_library_bars, log_base, verb_settings
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
    page = HelpPage("export", "Write a LoRA file of any layout for other tools.", "FILE", "file")
    config = verb_settings(ExportConfig(), page, arguments)
    _check_inputs(config)
    from flatlora_diffusion.lora_tools.converting import export_lora

    for written in export_lora(config):
        _print_written(written)


def import_verb(arguments: list[str]) -> None:
    page = HelpPage("import", "Write a LoRA file of any layout for diffusers.", "FILE", "file")
    config = verb_settings(ImportConfig(), page, arguments)
    _check_inputs(config)
    from flatlora_diffusion.lora_tools.converting import import_file

    for written in import_file(config):
        _print_written(written)


def merge_verb(arguments: list[str]) -> None:
    text = "Merge LoRAs into a base's weights, as a diffusers folder or as a single-file checkpoint for web UIs."
    page = HelpPage("merge", text, "--base BASE --lora LORA --output OUTPUT")
    config = verb_settings(MergeConfig(), page, arguments)
    if config.base:
        check_base("base", config.base)
    for lora in config.lora:
        parse_lora(lora)
    _log_base_name(config.base)
    from flatlora_diffusion.lora_tools.merging import merge_loras

    hide_library_bars()
    print(f"merged model saved in {merge_loras(config)}")


def resize_verb(arguments: list[str]) -> None:
    page = HelpPage("resize", "Write the best LoRA of a lower rank.", "FILE", "file")
    config = verb_settings(ResizeConfig(), page, arguments)
    _check_inputs(config)
    from flatlora_diffusion.lora_tools.resizing import resize_lora

    _print_reduced(resize_lora(config))


def average_verb(arguments: list[str]) -> None:
    page = HelpPage("average", "Write the average of several LoRAs of one base.", "LORA ...", "loras")
    config = verb_settings(AverageConfig(), page, arguments)
    for lora in config.loras:
        lora_file(lora)
    if config.base is not None:
        check_base("base", config.base)
    from flatlora_diffusion.lora_tools.averaging import average_loras

    averaged = average_loras(config)
    _print_written(averaged.written)
    print(f"rank {averaged.rank}; lost by truncation: {100 * averaged.lost:.3g} % of the average (Frobenius norm)")
    if averaged.embeddings is not None:
        print(f"embeddings of the new tokens saved in {averaged.embeddings}")


def extract_verb(arguments: list[str]) -> None:
    page = HelpPage("extract", "Write the difference of two models as a LoRA.", "--base BASE --tuned TUNED")
    config = verb_settings(ExtractConfig(), page, arguments)
    for name in ("base", "tuned"):
        if base := getattr(config, name):
            check_base(name, base)
    _log_base_name(config.base)
    from flatlora_diffusion.lora_tools.resizing import extract_lora

    hide_library_bars()
    _print_reduced(extract_lora(config))


def inspect_verb(arguments: list[str]) -> None:
    page = HelpPage("inspect", "Show the contents of a LoRA file and which tools read it.", "FILE", "file")
    config = verb_settings(InspectConfig(), page, arguments)
    _check_inputs(config)
    from flatlora_diffusion.lora_tools.inspecting import inspect_lora

    print(inspect_lora(config))


def _check_inputs(config: ExportConfig | ImportConfig | ResizeConfig | InspectConfig) -> None:
    """Report a wrong path before importing torch, which takes seconds."""
    lora_file(config.file)
    if config.base is not None:
        check_base("base", config.base)


def _log_base_name(name: str) -> None:
    if name:  # a missing name is reported later
        log_base(ModelConfig(pretrained_model_name_or_path=name), has_remedy=False)


def _print_written(written: WrittenFile) -> None:
    print(f"LoRA saved in {written.path}; largest rounding error of a layer: {written.error:.2g} of its update")


def _print_reduced(reduced: ReducedFile) -> None:
    _print_written(reduced.written)
    print(f"lost by the lower rank: {100 * reduced.missed:.3g} % of the whole change (Frobenius norm)")
