"""Resolve the settings that may be left open: seed and precision before the base is loaded, the others after."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list, parse_choice_from_env

from flatlora_diffusion.adapter.lora import planned_loras
from flatlora_diffusion.config import ADAPTERS, ConfigError, TrainConfig, settings_with
from flatlora_diffusion.data.schedule import Shape, build_schedule
from flatlora_diffusion.data.sources import check_folders_apart
from flatlora_diffusion.families.device import DTYPES, check_precision, this_process
from flatlora_diffusion.families.registry import family_of
from flatlora_diffusion.storage.atomic_io import check_writable
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.hub import hub_repository
from flatlora_diffusion.training.preview_prompts import read_pictures

logger = logging.getLogger(__name__)


def resolve(requested: TrainConfig, run: RunDir) -> TrainConfig:
    """The settings of a run with seed and precision, after all checks that need no model.

    The main process deletes requests and partial files that an earlier run has left.
    """
    config = resolve_before_loading(requested, run)
    if this_process().is_main_process:
        run.clean()
    check_before_loading(config)
    return config


def resolve_before_loading(config: TrainConfig, run: RunDir) -> TrainConfig:
    """Resolve seed and precision; if a run is resumed, also all settings that it has saved and `config` leaves open.

    Raises:
        ConfigError: the folder of a new run has other files or lies within the images, or there is no run to resume.
    """
    checkpoint = config.run.resume_from_checkpoint
    if checkpoint is not None and (checkpoint != "latest" or run.checkpoints()):
        _check_known_settings(run)
        return with_precision(with_seed(run.with_saved_settings(config)))
    if checkpoint is not None:
        _check_unfinished(run)
        logger.info("output_dir=%s has no checkpoint: starting a new run", config.run.output_dir)
    new = config.replace(resume_from_checkpoint=None)
    run.check_new(new.to_dict())
    check_folders_apart(new)
    return with_precision(with_seed(new))


def _check_known_settings(run: RunDir) -> None:
    """Raise ConfigError for a run with settings that this version no longer has."""
    removed = run.removed_settings()
    if removed:
        raise ConfigError(
            f"output_dir={str(run.folder)!r} holds a run with {', '.join(removed)}, which this version does not have; "
            f"give another --output_dir and --init_lora {str(run.folder / LORA_FILE)!r} to train its LoRA further"
        )


def is_made_with(run: RunDir, config: TrainConfig) -> bool:
    """Whether a run was made with the settings `config`, whose open settings may have any value."""
    if not run.config_file.is_file():
        return False
    values, saved = config.to_dict(), run.config()
    names = settings_with("is_resolved")
    if config.perturb.target_loss_increase > 0:  # rho is saved at the start of a run; runs before --rho_rise have none
        if saved.get("rho") is None:
            return False
        names = (*names, "rho")
    left_open = {name: saved.get(name) for name in names if values[name] is None}
    return not run.changed_settings(config.replace(**left_open))


def _check_unfinished(run: RunDir) -> None:
    """Raise ConfigError for a finished run without checkpoints, which cannot be resumed."""
    if run.is_finished:
        raise ConfigError(
            f"output_dir={str(run.folder)!r} holds a finished run without a checkpoint to resume from; give another "
            f"--output_dir and --init_lora {str(run.folder / LORA_FILE)!r} to train its LoRA further, or leave "
            "--resume_from_checkpoint out to start over"
        )


def with_seed(config: TrainConfig) -> TrainConfig:
    """`config` with a seed: its own, or a random one that all processes share."""
    if config.run.seed is not None:
        return config
    this_process()  # starts the process group for the broadcast
    (seed,) = broadcast_object_list([secrets.randbelow(2**31)])
    logger.info("seed %d", seed)
    return config.replace(seed=seed)


def check_before_loading(config: TrainConfig) -> None:
    """Check settings that are used only after the model is loaded. Raises ConfigError."""
    family_of(config.model).check_settings(config)
    if config.run.push_to_hub:
        hub_repository(config)
    read_pictures(config.run)
    if config.data.embedding_cache_dir is not None:
        check_writable(Path(config.data.embedding_cache_dir), "embedding_cache_dir")
    if ADAPTERS[config.adapter.adapter].is_linear_only:  # so that layers can be unfit for it
        model, family = config.model, family_of(config.model)
        parts = family.text_parts if config.adapter.train_text_encoder else ()
        encoders = {part: family.on_meta(model, part) for part in parts}
        planned_loras(family.on_meta(model, family.denoiser), config.adapter, encoders, model.clip_skip)


def with_precision(config: TrainConfig) -> TrainConfig:
    """`config` with a precision: its own, or that of accelerate's launcher, which is in an environment variable.

    Raises ConfigError for a precision that is not supported or that the GPU only emulates.
    """
    precision = config.optim.mixed_precision or parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in DTYPES:
        raise ConfigError(
            f"accelerate was configured for mixed_precision {precision!r}, not no, fp16 or bf16; give "
            "--mixed_precision, which overrides it"
        )
    check_precision("mixed_precision", precision, this_process().device)
    return config.replace(mixed_precision=precision)


def resolve_after_loading(
    config: TrainConfig,
    precision: str,
    resolution: int,
    size_step: int,
    images: Sequence[Shape],
    processes: int,
) -> TrainConfig:
    """Resolve precision, resolution and number of steps: a pure and idempotent function.

    The sides of images are multiples of `size_step` pixels.
    """
    sized = config.replace(mixed_precision=precision, resolution=resolution)
    return sized.replace(max_train_steps=build_schedule(sized, images, size_step, processes).total_steps)
