"""Train several LoRAs with different seeds and save their average as the result of the run (`--members`).

Each member is a run in `member-N/`. The same command resumes the members.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from flatlora_diffusion.adapter.delta import Update, Updates, padded
from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers
from flatlora_diffusion.adapter.new_tokens import new_tokens, replace_in_captions
from flatlora_diffusion.adapter.setup import adapted_models, load_initial
from flatlora_diffusion.config import RunError, StoppedError, TrainConfig
from flatlora_diffusion.data.class_images import load_class_samples
from flatlora_diffusion.data.dataset import Sample, SampleSet, manifest
from flatlora_diffusion.data.sources import hold_out, load_training_set
from flatlora_diffusion.families.device import this_process
from flatlora_diffusion.lora_files.safe_reading import read_header
from flatlora_diffusion.lora_tools.averaging import Average, average_updates
from flatlora_diffusion.signals import Interrupted
from flatlora_diffusion.storage.rng import derive_seed
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.failure import friendly_errors
from flatlora_diffusion.training.finish import present, save_result
from flatlora_diffusion.training.holdout import HeldoutLoss
from flatlora_diffusion.training.image_losses import ImageLosses
from flatlora_diffusion.training.previews import Previews
from flatlora_diffusion.training.resolve_config import is_made_with, resolve, with_seed
from flatlora_diffusion.training.state import TrainState, prepare

logger = logging.getLogger(__name__)

TrainMember = Callable[[TrainConfig, RunDir, SampleSet], Path]
STRENGTHS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # of the average; held-out images choose among them
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_RERUN_HINT = "the same command goes on from there"


def train_members(requested: TrainConfig, run: RunDir, train_member: TrainMember) -> Path:
    """Train all members, each by `train_member` in its own folder, and save their average as the result of `run`.

    Returns the path of the LoRA file for diffusers. Raises as a training does.
    """
    start_time = time.monotonic()
    config = resolve(with_first_seed(requested, run), run)
    images = load_training_set(config.data)
    training, heldout = hold_out(images.samples, config.data.holdout_images)
    configs = member_configs(config, run)
    for number, member_config in enumerate(configs, 1):
        member, name = run.member(number), f"member {number} of {len(configs)}"
        if _is_finished(member, member_config) and _is_same_run(member, member_config, training, heldout):
            logger.info("%s: already trained in %s", name, member.folder)
            continue
        logger.info("%s: trains with seed %d", name, member_config.run.seed)
        limit = config.optim.max_train_seconds
        if limit is not None:  # all members share it
            left = max(1.0, limit - (time.monotonic() - start_time))
            member_config = member_config.replace(max_train_seconds=left)
        if member.checkpoints() and not member.changed_settings(member_config):
            member_config = member_config.replace(resume_from_checkpoint="latest")
        with _training_of(member, name):
            train_member(member_config, member, images)
        (must_stop,) = broadcast_object_list([run.stop_file.exists()])  # all processes must agree
        if must_stop:
            raise StoppedError(f"stopped after {name} by the stop file; {_RERUN_HINT}")
    return _save_average(config, run, configs, training, heldout)


def member_configs(config: TrainConfig, run: RunDir) -> list[TrainConfig]:
    """The settings of each member, without previews, losses by image and upload; the first has `config`'s seed."""
    assert config.run.seed is not None
    assert config.average.members is not None
    seeds = [config.run.seed]
    seeds += [derive_seed(seeds[0], "member", number) % 2**31 for number in range(2, config.average.members + 1)]
    return [
        config.replace(
            members=None,
            average_rank=None,
            remove_members=False,
            seed=seed,
            output_dir=str(run.member(number).folder),
            output_name=None,
            resume_from_checkpoint=None,
            validation_prompt=None,
            validation_prompts_file=None,
            validation_data_dir=None,
            image_loss_draws=0,
            push_to_hub=False,
        )
        for number, seed in enumerate(seeds, 1)
    ]


def with_first_seed(config: TrainConfig, run: RunDir) -> TrainConfig:
    """`config` with a seed: its own, that of a first member that has been trained, or a random one."""
    first = run.member(1)
    if config.run.seed is None and first.config_file.is_file():
        return config.replace(seed=first.config()["seed"])
    return with_seed(config)


@contextmanager
def _training_of(member: RunDir, name: str) -> Iterator[None]:
    """Create the folder of a member, and put its name into the errors that end its training."""
    if this_process().is_main_process:
        member.folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except StoppedError as error:
        raise StoppedError(f"{name}: {str(error).partition('; ')[0]}; {_RERUN_HINT}") from error
    except RunError as error:
        raise RunError(f"{name}: {error}") from error
    except Interrupted as error:
        raise Interrupted(error.number, f"in {name}; {_RERUN_HINT}") from error


def _is_finished(member: RunDir, config: TrainConfig) -> bool:
    steps = config.optim.max_train_steps
    return member.is_finished and steps in (None, member.config().get("max_train_steps"))


def _is_same_run(member: RunDir, config: TrainConfig, training: Sequence[Sample], heldout: Sequence[Sample]) -> bool:
    """Whether a member was made with these settings, training images and held-out images, captions included."""
    if not is_made_with(member, config):
        return False
    tokens = new_tokens(config.tokens) if config.tokens.train_text_encoder_ti else {}
    rows = member.manifest()
    # Class images follow the training images.
    saved_training = [row for row in rows if not row.get("is_held_out")][: len(training)]
    saved_heldout = [row for row in rows if row.get("is_held_out")]
    return saved_training == manifest(replace_in_captions(training, tokens)) and saved_heldout == [
        {**row, "is_held_out": True} for row in manifest(heldout)
    ]


def _save_average(
    config: TrainConfig,
    run: RunDir,
    configs: Sequence[TrainConfig],
    training: Sequence[Sample],
    heldout: Sequence[Sample],
) -> Path:
    """Average the members and finish the run as a training would."""
    files = [run.member(number).folder / LORA_FILE for number in range(1, len(configs) + 1)]
    rank = sum(_rank(file) for file in files)
    rank = rank if config.average.average_rank is None else min(rank, config.average.average_rank)
    with friendly_errors(config):
        state = prepare(_plain_lora_config(config, rank), training, load_class_samples(config))
    try:
        with friendly_errors(state.config):
            state.progress.config = _with_resolved(config, state.config)
            previews = Previews(state) if state.accelerator.is_main_process else None
            if previews is not None:
                _start_run(run, state.config)
                previews.make("base", 0)
            images = ImageLosses(state, 0) if previews is not None and config.run.image_loss_draws else None
            average = average_updates([_read_updates(file) for file in files], [1 / len(files)] * len(files), rank)
            initial = {
                part: {module: padded(update, rank) for module, update in layers.items()}
                for part, layers in average.updates.items()
            }
            load_initial(state.base.pipeline, initial, {})
            strength, losses = _best_strength(state, heldout) if heldout else (1.0, {})
            _scale(state, strength)
            _log_average(state, run, configs, average, rank, strength, losses)
            if images is not None:
                images.measure(state.end)
            path = save_result(state)
        if config.average.remove_members and state.accelerator.is_main_process:
            for number in range(1, len(configs) + 1):
                shutil.rmtree(run.member(number).folder)
        if previews is not None:
            present(state, previews)
        state.accelerator.wait_for_everyone()
    finally:
        state.close()
    return path


def _start_run(run: RunDir, config: TrainConfig) -> None:
    """Create the run's folder, with manifest and `start` event of the first member."""
    first = run.member(1)
    run.start(config.to_dict(), first.manifest())
    run.add_event(next(event for event in first.events() if event["event"] == "start"))


def _rank(file: Path) -> int:
    """The highest rank of a diffusers LoRA file."""
    return max(entry.shape[0] for name, entry in read_header(file).entries.items() if name.endswith(_DOWN))


def _read_updates(file: Path) -> Updates:
    """The update of each layer in a run's diffusers file, whose B includes the scale."""
    checked = read_header(file)
    updates: dict[str, dict[str, Update]] = {}
    for name in checked.entries:
        if name.endswith(_DOWN):
            part, _, module = name.removesuffix(_DOWN).partition(".")
            up = checked.tensor(name.replace(_DOWN, _UP)).float()
            updates.setdefault(part, {})[module] = Update(checked.tensor(name).float(), up, 1.0)
    return updates


def _plain_lora_config(config: TrainConfig, rank: int) -> TrainConfig:
    """Settings for a plain LoRA of this rank and scale 1 on the layers of the members."""
    return config.of_method("lora").replace(
        members=None,
        average_rank=None,
        remove_members=False,
        rank=rank,
        adapter="lora",
        lora_alpha=None,
        lora_block_ranks=None,
        lora_dropout=0.0,
        use_rslora=False,
        init_lora=None,
        pissa_iterations=None,
        lora_ga_steps=None,
        use_ema=False,
        optimizer="adamw",
        use_8bit_adam=False,
        lora_plus_ratio=None,
        resume_from_checkpoint=None,
    )


def _with_resolved(config: TrainConfig, resolved: TrainConfig) -> TrainConfig:
    """`config` with the values that loading the base has resolved."""
    return config.replace(
        resolution=resolved.data.resolution,
        max_train_steps=resolved.optim.max_train_steps,
        mixed_precision=resolved.optim.mixed_precision,
    )


def _best_strength(state: TrainState, samples: Sequence[Sample]) -> tuple[float, dict[float, float]]:
    """The strength with the lowest held-out loss, and the loss at each strength."""
    heldout, losses = HeldoutLoss(state, samples), {}
    for strength in STRENGTHS:
        _scale(state, strength)
        losses[strength] = heldout.now()
        _scale(state, 1 / strength)
    best = min(losses, key=lambda strength: losses[strength])
    text = ", ".join(f"{strength:g}: {loss:.4f}" for strength, loss in losses.items())
    logger.info("held-out loss by strength of the average: %s; saving at strength %g", text, best)
    return best, losses


@torch.no_grad()
def _scale(state: TrainState, strength: float) -> None:
    """Multiply the LoRA's update by `strength`."""
    for model in adapted_models(state.base.pipeline, state.config.adapter).values():
        for layer in lora_layers(model).values():
            layer.lora_B[ADAPTER].weight.mul_(strength)


def _log_average(
    state: TrainState,
    run: RunDir,
    configs: Sequence[TrainConfig],
    average: Average,
    rank: int,
    strength: float,
    losses: dict[float, float],
) -> None:
    """Add the average and the members' steps to the run's events, and describe the average for card and metadata."""
    seeds = [config.run.seed for config in configs]
    strength_text = "" if strength == 1 else f" at strength {strength:g}"
    state.progress.average = (
        f"average of {len(configs)} LoRAs{strength_text}, seeds {', '.join(map(str, seeds))}, rank {rank}"
    )
    if average.lost:
        logger.info("the cut to rank %d loses %.3g %% of the average", rank, 100 * average.lost)
    if not state.accelerator.is_main_process:
        return
    for number in range(len(configs)):  # the steps of the members in sequence
        for event in run.member(number + 1).steps():
            run.add_event({**event, "step": event["step"] + number * state.total_steps})
    facts = {"members": len(configs), "seeds": seeds, "rank": rank, "lost": average.lost, "strength": strength}
    by_strength = {f"{value:g}": loss for value, loss in losses.items()}
    run.add_event({"event": "average", **facts, "heldout_losses": by_strength})
