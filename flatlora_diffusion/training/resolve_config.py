"""The settings that a run leaves open, settled before anything is built: seed, precision, resolution and steps."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list, parse_choice_from_env

from flatlora_diffusion.adapter.lora import planned_loras
from flatlora_diffusion.config import ADAPTERS, TEXT_PARTS, ConfigError, TrainConfig, settings_with
from flatlora_diffusion.data.image_folders import check_folders_apart
from flatlora_diffusion.data.schedule import Shape, schedule_of
from flatlora_diffusion.sdxl.device import DTYPES, this_process
from flatlora_diffusion.sdxl.shapes import on_meta
from flatlora_diffusion.storage.atomic_io import check_writable
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.hub import hub_repository
from flatlora_diffusion.training.preview_prompts import read_pictures

logger = logging.getLogger(__name__)


def new_or_resumed(config: TrainConfig, run: RunDir) -> TrainConfig:
    """`config` with its seed: for a new run, or, when one is resumed, with what it has saved for what is left open.

    Raises ConfigError for a new run whose folder holds what it must not touch or lies amid the images, and when there
    is no run to resume.
    """
    checkpoint = config.run.resume_from_checkpoint
    if checkpoint is not None and (checkpoint != "latest" or run.checkpoints()):
        _check_repeatable(run)
        return with_precision(seeded(run.filled_in(config)))
    if checkpoint is not None:
        _check_unfinished(run)
        logger.info("%s has no checkpoint yet: a new run is started", config.run.output_dir)
    new = config.replace(resume_from_checkpoint=None)
    run.check_new(new.to_dict())
    check_folders_apart(new)
    return with_precision(seeded(new))


def _check_repeatable(run: RunDir) -> None:
    """Raises ConfigError for a run with settings that this version cannot go on with."""
    removed = run.removed_settings()
    if removed:
        raise ConfigError(
            f"output_dir={str(run.folder)!r} holds a run with {', '.join(removed)}, which this version does not have: "
            f"give another --output_dir and --init_lora {str(run.folder / LORA_FILE)!r} to train its LoRA further"
        )


def is_made_with(run: RunDir, config: TrainConfig) -> bool:
    """Whether the run in the folder was made with these settings; what they leave open may have any value."""
    if not run.config_file.is_file():
        return False
    wanted, saved = config.to_dict(), run.config()
    names = settings_with("is_resolved")
    if config.perturb.target_loss_increase > 0:  # the rho is saved as the run begins; runs before --rho_rise have none
        if saved.get("rho") is None:
            return False
        names = (*names, "rho")
    left_open = {name: saved.get(name) for name in names if wanted[name] is None}
    return not run.changed_settings(config.replace(**left_open))


def _check_unfinished(run: RunDir) -> None:
    """Raises ConfigError for a finished run that kept no checkpoint: it cannot be trained longer."""
    ending, lora = run.ending(), run.folder / LORA_FILE
    if ending is not None and ending["event"] == "finished" and lora.is_file():
        raise ConfigError(
            f"output_dir={str(run.folder)!r} holds a finished run that has kept no checkpoint to go on from: give "
            f"another --output_dir and --init_lora {str(lora)!r} to train its LoRA further, or leave "
            "--resume_from_checkpoint out to train it anew"
        )


def seeded(config: TrainConfig) -> TrainConfig:
    """`config` with a seed: its own, or one from the operating system, the same on all processes."""
    if config.run.seed is not None:
        return config
    this_process()  # starts the process group that the broadcast needs
    (seed,) = broadcast_object_list([secrets.randbelow(2**31)])
    logger.info("seed %d", seed)
    return config.replace(seed=seed)


def check_early(config: TrainConfig) -> None:
    """Raises ConfigError, before the model is loaded, for what is needed only after that."""
    if config.run.push_to_hub:
        hub_repository(config)
    read_pictures(config.run)
    if config.data.embedding_cache_dir is not None:
        check_writable(Path(config.data.embedding_cache_dir), "embedding_cache_dir")
    if ADAPTERS[config.adapter.adapter].is_linear_only:  # which not every layer can have
        model, parts = config.model, TEXT_PARTS if config.adapter.train_text_encoder else ()
        encoders = {part: on_meta(model, part) for part in parts}
        planned_loras(on_meta(model, "unet"), config.adapter, encoders, model.clip_skip)


def with_precision(config: TrainConfig) -> TrainConfig:
    """`config` with a precision: its own, or that of accelerate's launcher, which speaks through the environment.

    Raises ConfigError for one that is not ours.
    """
    if config.optim.mixed_precision is not None:
        return config
    precision = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in DTYPES:
        raise ConfigError(
            f"accelerate was configured for mixed_precision {precision!r}, which is none of no, fp16, bf16; give "
            "--mixed_precision, which wins"
        )
    return config.replace(mixed_precision=precision)


def settled(
    config: TrainConfig,
    precision: str,
    resolution: int,
    size_step: int,
    images: Sequence[Shape],
    processes: int,
) -> TrainConfig:
    """`config`, which has its seed, with nothing left open: a pure function, and of its own result the same.

    `precision` is accelerate's, `resolution` and `size_step` are the base's for this config, `images` are
    those that are trained on.
    """
    sized = config.replace(mixed_precision=precision, resolution=resolution)
    return sized.replace(max_train_steps=schedule_of(sized, images, size_step, processes).total_steps)
