"""The command lines, made from `config.py`.

Exit codes: 0; 1 when a run had to stop; 2 for wrong input; 3 when a run was asked to stop and can be resumed; 130 and
143 when SIGINT (Ctrl-C) or SIGTERM ended what cannot be.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from flatlora_diffusion.commands.train_flags import parse_config
from flatlora_diffusion.config import (
    QUIET_VARIABLE,
    CompareConfig,
    ConfigError,
    ExportConfig,
    ExtractConfig,
    FlatnessConfig,
    GenerateConfig,
    ImportConfig,
    InspectConfig,
    MergeConfig,
    ModelConfig,
    ResizeConfig,
    RunError,
    StoppedError,
    TrainConfig,
)
from flatlora_diffusion.ground.saved_settings import check_paths
from flatlora_diffusion.lora_files.place import check_model_file, lora_file, parse_lora
from flatlora_diffusion.training.stopping import Interrupted, interruptible

if TYPE_CHECKING:
    from flatlora_diffusion.lora_tools.converting import Written
    from flatlora_diffusion.lora_tools.resizing import Reduced

Settings = TypeVar("Settings")

# Libraries that say what does not concern the user, such as which of their kernels this machine lacks.
_QUIET = {
    **dict.fromkeys(("httpx", "httpx2", "httpcore", "accelerate"), logging.WARNING),
    **dict.fromkeys(("torchao", "bitsandbytes", "torch.utils._pytree"), logging.ERROR),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m flatlora_diffusion VERB ...`; returns the exit code."""
    verbs: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "compare": _compare,
        "generate": _generate,
        "flatness": _flatness,
        "export": _export,
        "import": _import,
        "merge": _merge,
        "resize": _resize,
        "extract": _extract,
        "inspect": _inspect,
    }
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb = verbs.get(given[0]) if given else None
    if verb is None:
        print(f"usage: python -m flatlora_diffusion {{{','.join(verbs)}}} [--help]", file=sys.stderr)
        return 2
    return _run(verb, given[1:])


def train_main(arguments: Sequence[str] | None = None) -> int:
    """`train_dreambooth_flatlora.py ...`; returns the exit code."""
    return _run(_train, list(sys.argv[1:] if arguments is None else arguments))


def quiet_libraries() -> None:
    """Show no bars of the libraries, and none of their notes below an error; call it before they are imported."""
    for library, level in _QUIET.items():
        logging.getLogger(library).setLevel(level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _run(verb: Callable[[list[str]], None], arguments: list[str]) -> int:
    # Of several processes only the first speaks.
    is_quiet = QUIET_VARIABLE in os.environ or os.environ.get("RANK", "0") != "0"
    logging.basicConfig(level=logging.WARNING if is_quiet else logging.INFO, format="%(message)s")
    quiet_libraries()
    try:
        with interruptible():
            verb(arguments)
    except Interrupted as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 3 if isinstance(error, StoppedError) else 1
    return 0


def _train(arguments: list[str]) -> None:
    config = _checked(parse_config(arguments))
    from flatlora_diffusion.training.trainer import (
        train,  # torch and diffusers only after the settings were found right
    )

    _hide_library_bars()
    print(f"LoRA saved in {train(config)}")


def _compare(arguments: list[str]) -> None:
    import tyro

    own, rest = tyro.cli(
        CompareConfig,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        return_unknown_args=True,
        prog="python -m flatlora_diffusion compare",
        description="Train arms alike, LoRA and Flat-LoRA or others, and report what tells them apart. "
        "Takes all settings of `train` as well, --preset and --config too.",
    )
    config = _checked(parse_config(rest))
    if config.run.seed is None:  # a drawn one would train everything anew when the command is given again
        config = config.replace(seed=0)
    from flatlora_diffusion.compare.comparison import compare

    _hide_library_bars()
    folder = compare(config, own)
    print(f"\n{(folder / 'compare.md').read_text(encoding='utf-8')}")
    print(json.loads((folder / "compare.json").read_text(encoding="utf-8"))["verdict"])
    print(f"\nPictures    {folder / 'compare.png'}")
    print(f"LoRA files  {folder}, ARM/seed-N")
    print(f"Report      {folder / 'compare.html'}: open it in a browser")


def _generate(arguments: list[str]) -> None:
    description = "Draw prompts x seeds with the base and with each LoRA at each strength: PNG files and a grid."
    default = GenerateConfig(model=_base_of_runs(arguments))
    config = _settings(GenerateConfig, "generate", description, arguments, default)
    from flatlora_diffusion.gallery.gallery import generate

    _hide_library_bars()
    for picture in generate(config):
        print(f"Look at {picture}")


def _flatness(arguments: list[str]) -> None:
    description = "Measure how flat the loss is around the merged weights of finished runs: flatness RUN... --flags."
    folders = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    flags = arguments[len(folders) :]
    config = _settings(FlatnessConfig, "flatness", description, ["--runs", *folders, *flags] if folders else flags)
    from flatlora_diffusion.flatness.report import flatness

    _hide_library_bars()
    folder = flatness(config)
    print((folder / "flatness.md").read_text(encoding="utf-8"))
    names = ("surface.png", "surface.html", "rise.png", "slices.png", "strength.png")
    *others, last = (name for name in names if (folder / name).is_file())  # the page needs plotly
    print(f"Look at {', '.join(others)} and {last} in {folder}")


def _export(arguments: list[str]) -> None:
    description = "Write a LoRA file of any layout for other programs: export FILE --layout kohya, diffusers or both."
    config = _settings(ExportConfig, "export", description, _with_file(arguments))
    lora_file(config.file)  # a wrong path is told before torch is imported, which takes seconds
    from flatlora_diffusion.lora_tools.converting import export_lora

    for written in export_lora(config):
        _say_written(written)


def _import(arguments: list[str]) -> None:
    description = "Write a LoRA file of any layout for diffusers: import FILE."
    config = _settings(ImportConfig, "import", description, _with_file(arguments))
    lora_file(config.file)
    from flatlora_diffusion.lora_tools.converting import import_file

    for written in import_file(config):
        _say_written(written)


def _merge(arguments: list[str]) -> None:
    description = "Add LoRAs to a base's weights: a diffusers folder, or one checkpoint file for all web UIs."
    config = _settings(MergeConfig, "merge", description, arguments)
    check_model_file("base", config.base)
    for lora in config.lora:
        parse_lora(lora)
    from flatlora_diffusion.lora_tools.merging import merge_loras

    _hide_library_bars()
    print(f"merged model saved in {merge_loras(config)}")


def _resize(arguments: list[str]) -> None:
    description = "Write the best LoRA of a lower rank: resize FILE --rank 4."
    config = _settings(ResizeConfig, "resize", description, _with_file(arguments))
    lora_file(config.file)
    from flatlora_diffusion.lora_tools.resizing import resize_lora

    _say_reduced(resize_lora(config))


def _extract(arguments: list[str]) -> None:
    description = "Write the difference of two models as a LoRA."
    config = _settings(ExtractConfig, "extract", description, arguments)
    check_model_file("base", config.base)
    check_model_file("tuned", config.tuned)
    from flatlora_diffusion.lora_tools.resizing import extract_lora

    _hide_library_bars()
    _say_reduced(extract_lora(config))


def _inspect(arguments: list[str]) -> None:
    description = "Show what is in a LoRA file and which tools read it: inspect FILE."
    config = _settings(InspectConfig, "inspect", description, _with_file(arguments))
    lora_file(config.file)
    from flatlora_diffusion.lora_tools.report import inspect_lora

    print(inspect_lora(config))


def _settings(
    kind: type[Settings], verb: str, description: str, arguments: Sequence[str], default: Settings | None = None
) -> Settings:
    """The settings of a verb; prints help or an unknown flag and exits as argparse does."""
    import tyro

    return tyro.cli(
        kind,
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        prog=f"python -m flatlora_diffusion {verb}",
        description=description,
        default=tyro.MISSING_NONPROP if default is None else default,
    )


def _base_of_runs(arguments: Sequence[str]) -> ModelConfig:
    """The base that the runs of `--lora` were trained on; the usual default where a flag names one or no run is."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lora", nargs="*", default=[])
    parser.add_argument("--pretrained_model_name_or_path", "--pretrained-model-name-or-path")
    given, _ = parser.parse_known_args(list(arguments))
    if given.pretrained_model_name_or_path is not None or not given.lora:
        return ModelConfig()
    bases = {}
    for file in (file for text in given.lora for file in parse_lora(text)):
        folder = file.path.parent.parent if file.path.parent.name.startswith("checkpoint-") else file.path.parent
        if (folder / "config.json").is_file() and (folder / "events.jsonl").is_file():
            model = TrainConfig().updated_from(folder / "config.json").model
            check_paths(vars(model))
            bases[model.pretrained_model_name_or_path] = model
    if len(bases) > 1:
        names = ", ".join(sorted(bases))
        raise ConfigError(
            f"the LoRAs were trained on different bases ({names}): choose one with --pretrained_model_name_or_path"
        )
    return next(iter(bases.values()), ModelConfig())


def _with_file(arguments: list[str]) -> list[str]:
    """A first argument without a flag is the file."""
    return ["--file", *arguments] if arguments and not arguments[0].startswith("-") else arguments


def _say_written(written: Written) -> None:
    print(f"LoRA saved in {written.path}; largest error of a layer by rounding: {written.error:.2g} of its update")


def _say_reduced(reduced: Reduced) -> None:
    _say_written(reduced.written)
    print(f"missed by the lower rank: {100 * reduced.missed:.3g} % of the whole change (Frobenius norm)")


def _checked(config: TrainConfig) -> TrainConfig:
    check_paths(config.to_dict())
    if not config.data.instance_data_dir and not config.data.dataset_name:
        raise ConfigError("--instance_data_dir is missing: give the folder with the training images")
    return config


def _hide_library_bars() -> None:
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()
