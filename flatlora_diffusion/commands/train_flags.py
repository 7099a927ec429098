"""Reads the training settings of a command line: defaults, `--preset`, `--config`, then flags; the last value wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from flatlora_diffusion.commands.flags import Flag, flags_of, read_flags, with_values
from flatlora_diffusion.commands.help_page import HelpPage, requested_help, show_help
from flatlora_diffusion.config import (
    CompareConfig,
    ConfigError,
    Section,
    TrainConfig,
    WorkersConfig,
    check_unused_flags,
    cleared_by,
    preset_file,
    preset_names,
    setting,
    setting_hints,
    settings_not_of,
)
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.saved_config import expand_paths, is_truncated_path

Options = TypeVar("Options", bound=CompareConfig)


@dataclass(frozen=True)
class Sources(Section):
    """Sources of the settings."""

    preset: str | None = setting(None, f"settings to begin with: {', '.join(preset_names())}")
    config: str | None = setting(None, "JSON file of settings, such as config.json of a run; it wins over --preset")


_COMMON_FLAGS = (
    *("preset", "config", "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir"),
    *("rank", "lora_target_modules", "resolution", "max_train_steps", "train_batch_size", "learning_rate"),
    *("mixed_precision", "gradient_checkpointing", "cache_latents", "seed"),
)
TRAIN = HelpPage(
    "train",
    "Train a LoRA or Flat-LoRA of SDXL or FLUX.2 klein on a folder of images. --preset and --config give defaults; "
    "flags win.",
    usage="--instance_data_dir DIR",
    common=(
        *_COMMON_FLAGS[:6],
        *("method", "sigma"),
        *_COMMON_FLAGS[6:],
        *("members", "holdout_images", "validation_prompt", "checkpointing_steps", "resume_from_checkpoint"),
    ),
)
COMPARE = HelpPage(
    "compare",
    "Train arms (LoRA, Flat-LoRA or others) under equal conditions and report their differences. Also takes all flags "
    "of `train`, including --preset and --config.",
    usage="--instance_data_dir DIR --heldout_dir DIR",
    common=(*(item.name for item in fields(CompareConfig)), *_COMMON_FLAGS),
)
DEMO = HelpPage(
    "demo",
    "Compare LoRA, Flat-LoRA and an average of LoRAs on the sample icons and an included base: no GPU, no download. "
    "It is `compare` with other defaults, and takes all of its flags.",
    common=(
        "base",
        "output_dir",
        "arms",
        "max_train_steps",
        "num_seeds",
        "seed",
        "num_prompts",
        "guidance_scale",
        "workers",
    ),
)
EVIDENCE = HelpPage(
    "evidence",
    "Compare LoRA, Flat-LoRA, the average of three LoRAs and SAM on real SDXL, on the sample icons, part by part, and "
    "write figures for posting after each part. Needs a GPU of 12 GB with bf16, or a T4, and downloads the base and "
    "two encoders. It is `compare` with other defaults, and takes all of its flags.",
    common=(
        *("hours", "rehearse", "check", "gpu"),
        *("output_dir", "pretrained_model_name_or_path", "instance_data_dir", "heldout_dir", "resolution"),
        *("arms", "num_seeds", "max_train_steps", "mixed_precision", "encoders", "lpips", "workers"),
    ),
)


def parse_training(arguments: Sequence[str]) -> tuple[TrainConfig, WorkersConfig]:
    """Read the settings of a command line of `train`; print help and exit if requested.

    If the flags resume a run, its settings replace the defaults.

    Raises:
        ConfigError: A flag or value is invalid, or the method does not use a given flag.
    """
    flags = {**flags_of(Sources()), **flags_of(TrainConfig()), **flags_of(WorkersConfig())}
    kind = requested_help(arguments)
    if kind:
        show_help(TRAIN, flags, kind)
    given = read_flags(arguments, flags)
    config = _build_config(given)
    check_unused_flags(config.perturb, given)
    workers = with_values(WorkersConfig(), given)
    if workers.trains_at_once and config.average.members is None:
        raise ConfigError("--workers and --cluster train --members in parallel; give --members 3, or omit them")
    return config, workers


def parse_comparison(
    page: HelpPage, defaults: Sequence[str], arguments: Sequence[str], options: Options
) -> tuple[TrainConfig, Options]:
    """Read the settings of a comparison, whose arms replace the preset's method; print help and exit if requested.

    Args:
        defaults: Flags that `arguments` override.
        options: The default settings of the comparison.

    Raises:
        ConfigError: As `parse_training`.
    """
    flags = {**flags_of(options), **flags_of(Sources()), **flags_of(TrainConfig())}
    kind = requested_help(arguments)
    given = read_flags([*defaults, *([] if kind else arguments)], flags)
    config, options = _build_config(given, has_arms=True), with_values(options, given)
    if kind:
        sources: Mapping[str, Flag] = flags_of(with_values(Sources(), given))
        show_help(page, {**flags_of(options), **sources, **flags_of(config)}, kind)
    return config, options


def _build_config(given: Mapping[str, Any], has_arms: bool = False) -> TrainConfig:
    """Apply the given flags to the settings of their preset, file or resumed run."""
    preset, file, method = given.get("preset"), given.get("config"), given.get("method")
    config = TrainConfig() if file is not None else _resumed_config(given)
    if preset is not None:
        config = config.updated_from(preset_file(preset), config.perturb.method if has_arms else method)
    if file is not None:
        config = _with_own_output_dir(config.updated_from(Path(file), method), Path(file).parent)
    flags = {name: value for name, value in given.items() if name in setting_hints()}
    config = _without_overridden(config, flags).replace(**flags)
    return config.replace(**expand_paths(config.to_dict()))


def _resumed_config(given: Mapping[str, Any]) -> TrainConfig:
    """The settings of the run that the flags resume, or else the defaults."""
    config = TrainConfig()
    if given.get("resume_from_checkpoint") is None:
        return config
    preset = given.get("preset")
    defaults = config if preset is None else config.updated_from(preset_file(preset))
    saved = RunDir(Path(given.get("output_dir") or defaults.run.output_dir)).config_file
    return config.updated_from(saved) if saved.is_file() else config


def _with_own_output_dir(config: TrainConfig, folder: Path) -> TrainConfig:
    """Set the output folder of a run's config.json to its folder if the saved path was shortened."""
    is_cut, is_run = is_truncated_path(config.run.output_dir), RunDir(folder).manifest_file.is_file()
    return config.replace(output_dir=str(folder)) if is_cut and is_run else config


def _without_overridden(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """Remove the settings of preset and file that conflict with given flags."""
    if "method" in given:
        config = config.replace(**{name: None for name in settings_not_of(given["method"]) if name not in given})
    if "num_train_epochs" in given and "max_train_steps" not in given:
        config = config.replace(max_train_steps=None)
    return config.replace(**cleared_by(given))
