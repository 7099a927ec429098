"""The command lines, made from `config.py`.

Exit codes: 0; 1 when a run had to stop; 2 for wrong input; 3 when a run was asked to stop and can be resumed.
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from flatlora_diffusion.config import (
    SAMPLES,
    ConfigError,
    GenerateConfig,
    RunError,
    StoppedError,
    TrainConfig,
    choices_of,
    preset_file,
    setting_hints,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m flatlora_diffusion VERB ...`; returns the exit code."""
    verbs: dict[str, Callable[[list[str]], None]] = {"train": _train, "compare": _compare, "generate": _generate}
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = verbs.get(given[0]) if given else None
    if verb is None:
        print(f"usage: python -m flatlora_diffusion {{{','.join(verbs)}}} [--help]", file=sys.stderr)
        return 2
    return _run(verb, given[1:])


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`train_dreambooth_flatlora.py ...`; returns the exit code."""
    return _run(_train, list(sys.argv[1:] if arguments is None else arguments))


def parse_config(arguments: Sequence[str]) -> TrainConfig:
    """The settings of a command line: defaults, then `--preset`, then `--config`, then flags; the last one wins.

    Raises ConfigError for a setting out of range; prints help or an unknown flag and exits as argparse does.
    """
    import tyro

    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--preset")
    files.add_argument("--config", type=Path)
    given, flags = files.parse_known_args(list(arguments))
    config = TrainConfig()
    if given.preset is not None:
        config = config.updated_from(preset_file(given.preset))
    if given.config is not None:
        config = config.updated_from(given.config)
    return tyro.cli(
        TrainConfig,
        default=config,
        args=_as_tyro_reads(flags),
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        description="Train a LoRA or Flat-LoRA of an SDXL base on a folder of images. "
        "--preset NAME and --config FILE.json give defaults; flags win.",
    )


def _run(verb: Callable[[list[str]], None], arguments: list[str]) -> int:
    is_first = os.environ.get("RANK", "0") == "0"  # of several processes only the first speaks
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, format="%(message)s")
    for library in ("httpx", "httpx2", "httpcore", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # One progress bar is shown, that of the training, and no notes of the libraries below an error.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        verb(arguments)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3 if isinstance(error, StoppedError) else 1
    return 0


def _train(arguments: list[str]) -> None:
    config = _with_images(parse_config(arguments))
    from flatlora_diffusion.trainer import train  # torch and diffusers only after the settings were found right

    _hide_library_bars()
    print(f"LoRA saved in {train(config)}")


def _compare(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m flatlora_diffusion compare",
        description="Train LoRA and Flat-LoRA as a fair pair and compare them; takes all settings of `train` as well.",
        add_help=not arguments or "--help" not in arguments,
        allow_abbrev=False,
    )
    icons = SAMPLES / "icons_3d" / "heldout"
    parser.add_argument("--heldout_dir", type=Path, default=icons, help="images of the style that are not trained on")
    parser.add_argument("--prompts_file", type=Path, default=icons / "prompts.txt", help="one prompt per line")
    own, rest = parser.parse_known_args(arguments)
    config = _with_images(parse_config(rest))
    if config.run.seed is None:  # both arms must have the same
        config = config.replace(seed=secrets.randbelow(2**31))
        print(f"seed {config.run.seed}")
    if not own.prompts_file.is_file():
        raise ConfigError(
            f"prompts_file={str(own.prompts_file)!r} is no file; give a text file with one prompt per line"
        )
    prompts = [line.strip() for line in own.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    from flatlora_diffusion.compare import compare

    _hide_library_bars()
    picture = compare(config, own.heldout_dir, prompts)
    print(picture.with_suffix(".md").read_text(encoding="utf-8"))
    print(f"Look at {picture}")
    print(f"The LoRA files are in {picture.parent / 'lora'} and {picture.parent / 'flat-lora'}")


def _generate(arguments: list[str]) -> None:
    import tyro

    config = tyro.cli(
        GenerateConfig,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        prog="python -m flatlora_diffusion generate",
        description="Draw prompts x seeds with the base and with each LoRA at each strength: PNG files and a grid.",
    )
    from flatlora_diffusion.gallery import generate

    _hide_library_bars()
    for picture in generate(config):
        print(f"Look at {picture}")


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


def _with_images(config: TrainConfig) -> TrainConfig:
    if not config.data.instance_data_dir and not config.data.dataset_name:
        raise ConfigError("--instance_data_dir is missing: give the folder with the training images")
    return config


def _hide_library_bars() -> None:
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
