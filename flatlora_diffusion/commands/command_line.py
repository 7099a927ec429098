"""The command `flatlora VERB`, with flags generated from the settings.

Exit codes: 0 for success; 1 if a run fails; 2 for wrong input; 3 if a run was stopped on request and can be resumed;
130 or 143 if SIGINT (Ctrl-C) or SIGTERM ended a program that cannot be resumed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from flatlora_diffusion.commands.doctor import doctor
from flatlora_diffusion.commands.help_page import HELP, HelpPage
from flatlora_diffusion.commands.lora_verbs import (
    average_verb,
    export_verb,
    extract_verb,
    import_verb,
    inspect_verb,
    merge_verb,
    resize_verb,
)
from flatlora_diffusion.commands.train_flags import (
    COMPARE,
    DEMO,
    EVIDENCE,
    Options,
    parse_comparison,
    parse_training,
)
from flatlora_diffusion.commands.verb_settings import hide_library_bars, log_base, verb_settings
from flatlora_diffusion.compare.evidence_check import read_evidence, report_row
from flatlora_diffusion.compare.evidence_defaults import BASE_FLAGS, DEFAULTS, PART_FLAGS, PARTS, Part
from flatlora_diffusion.config import (
    QUIET_VARIABLE,
    TINY,
    TINY_KLEIN,
    CaptionConfig,
    CompareConfig,
    ConfigError,
    DemoConfig,
    EvidenceConfig,
    FlatnessConfig,
    GenerateConfig,
    ModelConfig,
    RunError,
    TrainConfig,
    shipped,
)
from flatlora_diffusion.data.sources import check_training_set
from flatlora_diffusion.families.registry import base_line, base_title, family_of
from flatlora_diffusion.lora_files.paths import parse_lora, run_of
from flatlora_diffusion.signals import Interrupted, interruptible
from flatlora_diffusion.storage.model_paths import check_base, check_lora, check_models
from flatlora_diffusion.storage.saved_config import check_paths, expand_paths
from flatlora_diffusion.storage.versions import PROGRAM, __version__

DEMO_ARMS = ("lora", "flat-lora", "lora:members=3")
DEMO_FLAGS = ("--preset", "demo", "--no_controls", "--arms", *DEMO_ARMS)
DEMO_FLAGS_OF_BASE = {
    TINY: ("--guidance_scale", "2.5"),  # at the default of 5 the tiny base shows more of its own style
    TINY_KLEIN: (
        *("--pretrained_model_name_or_path", TINY_KLEIN, "--lora_target_modules", "all-linear"),
        *("--guidance_scale", "4", "--output_dir", "outputs/demo_klein"),
    ),
}

# Log levels of libraries whose messages are irrelevant to users, such as which kernels this machine lacks.
_QUIET = {
    **dict.fromkeys(("httpx", "httpx2", "httpcore", "accelerate"), logging.WARNING),
    **dict.fromkeys(("torchao", "bitsandbytes", "torch.utils._pytree"), logging.ERROR),
}


class Verb(NamedTuple):
    """A verb of `flatlora`; its function may return an exit code."""

    run: Callable[[list[str]], int | None]
    summary: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `flatlora VERB ...` and return the exit code."""
    verbs = _verbs()
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in HELP:
        print("usage: flatlora VERB [--help]\n")
        print("\n".join(f"  {name:<10}{verb.summary}" for name, verb in verbs.items()))
        return 0
    if name == "--version":
        print(f"{PROGRAM} {__version__}")
        return 0
    if name not in verbs:
        print(f"error: flatlora has no verb {name!r}; use one of: {', '.join(verbs)}", file=sys.stderr)
        return ConfigError.exit_code
    run = verbs[name].run
    return _app(words[1:]) if run is _app else _run(run, words[1:])


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Run `train_dreambooth_flatlora.py ...` and return the exit code."""
    return _run(_train, list(sys.argv[1:] if arguments is None else arguments))


def _verbs() -> dict[str, Verb]:
    return {
        "demo": Verb(
            _demo,
            "train LoRA, Flat-LoRA and an average of LoRAs on sample icons; no GPU, no download",
        ),
        "train": Verb(_train, "train a LoRA or Flat-LoRA on a folder of images"),
        "compare": Verb(_compare, "train methods under equal conditions and report their differences"),
        "evidence": Verb(_evidence, "compare on real SDXL with 23 icons: a GPU of 12 GB with bf16, or a T4"),
        "generate": Verb(_generate, "draw prompts with the base and with LoRAs at several strengths"),
        "flatness": Verb(_flatness, "measure the flatness of the loss around finished runs"),
        "app": Verb(_app, "train, compare and generate in the browser"),
        "caption": Verb(_caption, "caption the images of a folder with a model of your choice"),
        "inspect": Verb(inspect_verb, "show the contents of a LoRA file and which tools read it"),
        "export": Verb(export_verb, "write a LoRA file for other tools"),
        "import": Verb(import_verb, "write a LoRA file of any layout for diffusers"),
        "merge": Verb(merge_verb, "add LoRAs to a base's weights"),
        "resize": Verb(resize_verb, "write the best LoRA of a lower rank"),
        "average": Verb(average_verb, "write the average of several LoRAs"),
        "extract": Verb(extract_verb, "write the difference of two models as a LoRA"),
        "doctor": Verb(doctor, "check the installation and suggest fixes"),
    }


def quiet_libraries() -> None:
    """Hide the libraries' progress bars and their messages below errors; call before importing them."""
    for library, level in _QUIET.items():
        logging.getLogger(library).setLevel(level)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _run(verb: Callable[[list[str]], int | None], arguments: list[str]) -> int:
    # Only the first of several processes logs.
    is_quiet = QUIET_VARIABLE in os.environ or os.environ.get("RANK", "0") != "0"
    logging.basicConfig(level=logging.WARNING if is_quiet else logging.INFO, format="%(message)s")
    quiet_libraries()
    try:
        with interruptible():
            return verb(arguments) or 0
    except Interrupted as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _train(arguments: list[str]) -> None:
    config, workers = parse_training(arguments)
    config = _validated(config)
    log_base(config.model)
    from flatlora_diffusion.training.trainer import train  # imports torch and diffusers, so only for valid settings

    hide_library_bars()
    if workers.trains_at_once:
        from flatlora_diffusion.compare.members import train_members_in_parallel

        config = train_members_in_parallel(config, workers)
    print(f"LoRA saved in {train(config)}")
    print(base_line(config.model))


def _caption(arguments: list[str]) -> None:
    text = "Caption the images of a folder that have no caption, with a model of your choice."
    config = verb_settings(CaptionConfig(), HelpPage("caption", text, "FOLDER --captioner MODEL", "folder"), arguments)
    from flatlora_diffusion.evaluation.caption_files import write_captions

    hide_library_bars()
    print(f"{write_captions(config)} captions written; please read and correct them")


def _demo(arguments: list[str]) -> None:
    base = parse_comparison(DEMO, DEMO_FLAGS, arguments, DemoConfig())[1].base
    defaults = [*DEMO_FLAGS, *DEMO_FLAGS_OF_BASE[base]]
    _run_comparison(*_comparison(arguments, DEMO, defaults, DemoConfig()), has_remedy=False)


def _has_flag(name: str, arguments: list[str]) -> bool:
    return any(flag.replace("-", "_").partition("=")[0] == f"__{name}" for flag in arguments)


def _compare(arguments: list[str]) -> None:
    _run_comparison(*_comparison(arguments, COMPARE, (), CompareConfig()))


def _run_comparison(config: TrainConfig, options: CompareConfig, has_remedy: bool = True) -> None:
    log_base(config.model, has_remedy)
    from flatlora_diffusion.compare.comparison import compare

    hide_library_bars()
    _print_report(compare(config, options), config.model)


def _evidence(arguments: list[str]) -> None:
    base = () if _has_flag("pretrained_model_name_or_path", arguments) else BASE_FLAGS
    config, options = _comparison(arguments, EVIDENCE, (*DEFAULTS, *base), EvidenceConfig())
    if options.check is not None:
        print(report_row(read_evidence(Path(options.check))))
        return
    is_own = any(_has_flag(name, arguments) for name in PART_FLAGS)
    parts = [Part("your comparison", options.arms, options.num_seeds, options.controls)] if is_own else PARTS
    from flatlora_diffusion.compare.evidence import evidence, settings_for_gpu

    config = settings_for_gpu(config, options.gpu, options.rehearse)
    if options.rehearse:
        from flatlora_diffusion.compare.rehearsal import rehearsal_lines

        print("\n".join(rehearsal_lines(config, options, parts)))
        return
    log_base(config.model)
    hide_library_bars()
    file = evidence(config, options, parts)
    _print_report(file.parent, config.model)
    print(f"Figures     {file}: contains no personal data; please post it in an issue")


def _comparison(
    arguments: Sequence[str], page: HelpPage, defaults: Sequence[str], options: Options
) -> tuple[TrainConfig, Options]:
    config, options = parse_comparison(page, defaults, arguments, options)
    config = _validated(config)
    if config.run.seed is None:  # a random seed would train everything again when the command is repeated
        config = config.replace(seed=0)
    return config, options


def _print_report(folder: Path, model: ModelConfig) -> None:
    print(f"\n{(folder / 'compare.md').read_text(encoding='utf-8')}")
    print(json.loads((folder / "compare.json").read_text(encoding="utf-8"))["verdict"])
    print(f"\nBase        {base_title(model)}")
    print(f"Pictures    {folder / 'compare.png'}")
    print(f"LoRA files  {folder}, ARM/seed-N")
    print(f"Report      {folder / 'compare.html'}: open it in a browser")


def _generate(arguments: list[str]) -> None:
    text = "Draw each prompt and seed with the base and with each LoRA at each strength, as PNG files and a grid."
    page = HelpPage("generate", text, "--prompts PROMPT ...")
    config = verb_settings(GenerateConfig(), page, arguments)
    files = [file.path for lora in config.lora for file in parse_lora(lora)]
    of_runs = None if _has_flag("pretrained_model_name_or_path", arguments) else _base_of_runs(files)
    if of_runs is not None:
        config = verb_settings(replace(GenerateConfig(), model=of_runs), page, arguments)
    check_models(config.model)
    family_of(config.model).check_resolution(config.model, config.resolution)
    log_base(config.model, has_remedy=of_runs is None)
    from flatlora_diffusion.gallery.gallery import generate

    hide_library_bars()
    for picture in generate(config):
        print(f"Look at {picture}, drawn with {base_title(config.model)}")


def _flatness(arguments: list[str]) -> None:
    text = "Measure the flatness of the loss around the merged weights of finished runs."
    config = verb_settings(FlatnessConfig(), HelpPage("flatness", text, "RUN ...", "runs"), arguments)
    for name in ("pretrained_model_name_or_path", "other_base"):
        if (base := getattr(config, name)) is not None:
            check_base(name, base)
    if config.second_lora is not None:
        check_lora("second_lora", config.second_lora)
    from flatlora_diffusion.flatness.report import flatness

    hide_library_bars()
    folder = flatness(config)
    print((folder / "flatness.md").read_text(encoding="utf-8"))
    names = ("surface.png", "surface.html", "rise.png", "slices.png", "strength.png")
    *others, last = (name for name in names if (folder / name).is_file())  # surface.html needs plotly
    print(f"Look at {', '.join(others)} and {last} in {folder}")


def _app(arguments: list[str]) -> int:
    """Run the app, which is inside of this package if installed and beside it in a checkout."""
    folder = shipped("app")
    for name in ("flatlora_diffusion.app", "app"):
        spec = find_spec(name)  # may be another package named `app`
        if spec is not None and spec.origin is not None and Path(spec.origin).resolve().parent == folder:
            return int(import_module(f"{name}.__main__").main(arguments))
    raise ModuleNotFoundError(f"the app in {folder} cannot be imported")


def _base_of_runs(files: Sequence[Path]) -> ModelConfig | None:
    """The base of the runs that the LoRA files are in; None without runs. Raises ConfigError for two bases."""
    bases = {}
    for file in files:
        if (run := run_of(file)) is not None:
            saved = TrainConfig().updated_from(run.config_file).to_dict()
            model = TrainConfig.from_dict(expand_paths(saved)).model
            check_paths(vars(model))
            bases[model.pretrained_model_name_or_path] = model
    if len(bases) > 1:
        names = ", ".join(sorted(bases))
        raise ConfigError(
            f"the LoRAs were trained on different bases ({names}): choose a base with --pretrained_model_name_or_path"
        )
    return next(iter(bases.values()), None)


def _validated(config: TrainConfig) -> TrainConfig:
    """Return `config` after checking its paths, images, captions and resolution. Raises ConfigError."""
    check_paths(config.to_dict())
    if not config.data.is_given:
        raise ConfigError("--instance_data_dir is missing: give the folder with the training images")
    check_models(config.model, config.adapter.init_lora)
    check_training_set(config.data)
    family_of(config.model).check_resolution(config.model, config.data.resolution)
    return config
