"""The training settings of a command line: defaults, `--preset`, `--config`, then flags; what comes last wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from flatlora_diffusion.commands.flags import Flag, flags_of, read_flags, with_values
from flatlora_diffusion.commands.help_page import Page, help_wanted, show_help
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
from flatlora_diffusion.storage.saved_config import is_cut_path, opened


@dataclass(frozen=True)
class Sources(Section):
    """What the settings begin with."""

    preset: str | None = setting(None, f"settings to begin with: {', '.join(preset_names())}")
    config: str | None = setting(None, "JSON file of settings, such as config.json of a run; it wins over --preset")


_OF_RUNS = (
    *("preset", "config", "pretrained_model_name_or_path", "instance_data_dir", "instance_prompt", "output_dir"),
    *("rank", "lora_target_modules", "resolution", "max_train_steps", "train_batch_size", "learning_rate"),
    *("mixed_precision", "gradient_checkpointing", "cache_latents", "seed"),
)
TRAIN = Page(
    "train",
    "Train a LoRA or Flat-LoRA of an SDXL base on a folder of images. --preset and --config give defaults; flags win.",
    usage="--instance_data_dir DIR",
    usual=(
        *_OF_RUNS[:6],
        *("method", "sigma"),
        *_OF_RUNS[6:],
        *("members", "holdout_images", "validation_prompt", "checkpointing_steps", "resume_from_checkpoint"),
    ),
)
COMPARE = Page(
    "compare",
    "Train arms alike, LoRA and Flat-LoRA or others, and report what tells them apart. Takes all settings of `train` "
    "as well, --preset and --config too.",
    usage="--instance_data_dir DIR --heldout_dir DIR",
    usual=(*(item.name for item in fields(CompareConfig)), *_OF_RUNS),
)
DEMO = Page(
    "demo",
    "Train LoRA, Flat-LoRA and SAM on the sample icons and compare them, on the tiny base that ships with this "
    "program: no GPU, no download. It is `compare` with settings of its own, and takes all of its flags.",
    usual=("output_dir", "arms", "max_train_steps", "num_seeds", "seed", "num_prompts", "guidance_scale", "workers"),
)
EVIDENCE = Page(
    "evidence",
    "Compare Flat-LoRA with LoRA on real SDXL, on the sample icons with three seeds, and write figures that can be "
    "posted. It needs a GPU of 12 GB with bf16 and downloads the base and two encoders. It is `compare` with settings "
    "of its own, and takes all of its flags.",
    usual=(
        *("output_dir", "pretrained_model_name_or_path", "instance_data_dir", "heldout_dir", "resolution"),
        *("arms", "num_seeds", "max_train_steps", "mixed_precision", "encoders", "lpips", "workers"),
    ),
)


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """The settings of a training that a command line gives, as `parse_training` reads them."""
    return parse_training(arguments)[0]


def parse_training(arguments: Sequence[str]) -> tuple[TrainConfig, WorkersConfig]:
    """The settings of a command line of `train`; prints help and exits if that is asked for.

    A run that is resumed by flags has its own settings in place of the defaults. Raises ConfigError for a flag or a
    value that cannot be, and for flags that the method does not read.
    """
    flags = {**flags_of(Sources()), **flags_of(TrainConfig()), **flags_of(WorkersConfig())}
    wanted = help_wanted(arguments)
    if wanted:
        show_help(TRAIN, flags, wanted)
    given = read_flags(arguments, flags)
    config = _config_of(given)
    check_unused_flags(config.perturb, given)
    workers = with_values(WorkersConfig(), given)
    if workers.trains_at_once and config.average.members is None:
        raise ConfigError("--workers and --cluster train --members at once; give --members 3, or leave them out")
    return config, workers


def parse_comparison(
    page: Page, defaults: Sequence[str], arguments: Sequence[str]
) -> tuple[TrainConfig, CompareConfig]:
    """The settings of a comparison, whose arms have methods of their own in place of the preset's.

    The flags of `defaults` come first. Prints help and exits if that is asked for. Raises ConfigError as
    `parse_config`.
    """
    flags = {**flags_of(CompareConfig()), **flags_of(Sources()), **flags_of(TrainConfig())}
    wanted = help_wanted(arguments)
    given = read_flags([*defaults, *([] if wanted else arguments)], flags)
    config, own = _config_of(given, has_arms=True), with_values(CompareConfig(), given)
    if wanted:
        sources: Mapping[str, Flag] = flags_of(with_values(Sources(), given))
        show_help(page, {**flags_of(own), **sources, **flags_of(config)}, wanted)
    return config, own


def _config_of(given: Mapping[str, Any], has_arms: bool = False) -> TrainConfig:
    """The settings of the flags that are `given`, over what their preset, file or resumed run has."""
    preset, file, method = given.get("preset"), given.get("config"), given.get("method")
    config = TrainConfig() if file is not None else _of_resumed(given)
    if preset is not None:
        config = config.updated_from(preset_file(preset), config.perturb.method if has_arms else method)
    if file is not None:
        config = _in_its_folder(config.updated_from(Path(file), method), Path(file).parent)
    flags = {name: value for name, value in given.items() if name in setting_hints()}
    config = _without_overruled(config, flags).replace(**flags)
    return config.replace(**opened(config.to_dict()))


def _of_resumed(given: Mapping[str, Any]) -> TrainConfig:
    """The settings of the run that the flags resume; the defaults if they resume none."""
    config = TrainConfig()
    if given.get("resume_from_checkpoint") is None:
        return config
    preset = given.get("preset")
    usual = config if preset is None else config.updated_from(preset_file(preset))
    saved = RunDir(Path(given.get("output_dir") or usual.run.output_dir)).config_file
    return config.updated_from(saved) if saved.is_file() else config


def _in_its_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    """`config`, read from `folder`, with that as its output folder if it is the run's own and not saved otherwise."""
    is_cut, is_run = is_cut_path(config.run.output_dir), RunDir(folder).manifest_file.is_file()
    return config.replace(output_dir=str(folder)) if is_cut and is_run else config


def _without_overruled(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """`config`, from preset and file, without the settings that would get in the way of flags that are given."""
    if "method" in given:
        config = config.replace(**{name: None for name in settings_not_of(given["method"]) if name not in given})
    if "num_train_epochs" in given and "max_train_steps" not in given:
        config = config.replace(max_train_steps=None)
    return config.replace(**cleared_by(given))
