"""The training settings of a command line, made from `config.py`."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.config import (
    TrainConfig,
    choices_of,
    overruled_by,
    preset_file,
    refuse_unread,
    setting_hints,
    settings_that,
    unused_by,
)
from flatlora_diffusion.ground.run_dir import RunDir
from flatlora_diffusion.ground.saved_settings import is_cut_path, opened


def parse_config(arguments: Sequence[str], has_arms: bool = False) -> TrainConfig:
    """The settings of a command line: defaults, then `--preset`, then `--config`, then flags; the last one wins.

    A run that is resumed by flags has its own settings in place of the defaults. Raises ConfigError for a setting out
    of range, and for flags that the method does not read, unless it `has_arms`, of which each has a method of its own
    in place of the preset's; prints help or an unknown flag and exits as argparse does.
    """
    import tyro

    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--preset")
    files.add_argument("--config", type=Path)
    given, others = files.parse_known_args(list(arguments))
    flags = _lines_in_one(_as_tyro_reads(others))
    method = _given(flags).get("method")
    config = TrainConfig()
    if given.config is None:
        config = _of_resumed(flags, given.preset)
    if given.preset is not None:
        config = config.updated_from(preset_file(given.preset), config.perturb.method if has_arms else method)
    if given.config is not None:
        config = _in_its_folder(config.updated_from(given.config, method), given.config.parent)
    config = tyro.cli(
        TrainConfig,
        default=_without_overruled(config, flags),
        args=flags,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        prog="flatlora train",
        description="Train a LoRA or Flat-LoRA of an SDXL base on a folder of images. "
        "--preset NAME and --config FILE.json give defaults; flags win.",
    )
    if not has_arms:
        refuse_unread(config.perturb, _given(flags))
    return config.replace(**opened(config.to_dict()))


def _of_resumed(flags: Sequence[str], preset: str | None) -> TrainConfig:
    """The settings of the run that the flags resume; the defaults if they resume none."""
    config = TrainConfig()
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
    places.add_argument("--output_dir", "--output-dir")
    given, _ = places.parse_known_args(list(flags))
    usual = config if preset is None else config.updated_from(preset_file(preset))
    saved = RunDir(Path(given.output_dir or usual.run.output_dir)).config_file
    return config if given.resume_from_checkpoint is None or not saved.is_file() else config.updated_from(saved)


def _in_its_folder(config: TrainConfig, folder: Path) -> TrainConfig:
    """`config`, read from `folder`, with that as its output folder if it is the run's own and not saved otherwise."""
    is_cut, is_run = is_cut_path(config.run.output_dir), RunDir(folder).manifest_file.is_file()
    return config.replace(output_dir=str(folder)) if is_cut and is_run else config


def _as_tyro_reads(flags: Sequence[str]) -> list[str]:
    """diffusers' spellings in tyro's: `--prodigy_decouple False` as `--no_prodigy_decouple`, choices in any case."""
    hints = setting_hints()
    read: list[str] = []
    left = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--") else [flag])]
    while left:
        flag = left.pop(0)
        name = flag.removeprefix("--").replace("-", "_")
        value = left[0] if left and flag.startswith("--") else None
        kind = hints.get(name)
        if kind is bool and value is not None and value.lower() in ("true", "false"):
            read.append(flag if left.pop(0).lower() == "true" else f"--no_{name}")
        elif kind is not None and value is not None and value.lower() in choices_of(kind):
            read += [flag, left.pop(0).lower()]
        else:
            read.append(flag)
    return read


def _lines_in_one(flags: Sequence[str]) -> list[str]:
    """A setting of lines that is given several times as one flag with all of them."""
    read: list[str] = []
    places: dict[str, int] = {}
    left = list(flags)
    while left:
        flag = left.pop(0)
        name = flag[2:].replace("-", "_")
        if not (flag.startswith("--") and name in settings_that("is_lines") and left):
            read.append(flag)
        elif name in places:
            read[places[name]] += f"\n{left.pop(0)}"
        else:
            places[name] = len(read) + 1
            read += [flag, left.pop(0)]
    return read


def _given(flags: Sequence[str]) -> dict[str, str]:
    """What follows each flag, by its setting."""
    pairs = itertools.pairwise([*flags, ""])
    return {flag[2:].replace("-", "_"): value for flag, value in pairs if flag.startswith("--")}


def _without_overruled(config: TrainConfig, flags: Sequence[str]) -> TrainConfig:
    """`config`, from preset and file, without the settings that would get in the way of other flags."""
    given = _given(flags)
    if "method" in given:
        config = config.replace(**{name: None for name in unused_by(given["method"]) if name not in given})
    if "num_train_epochs" in given and "max_train_steps" not in given:
        config = config.replace(max_train_steps=None)
    return config.replace(**overruled_by(given))
