"""Several LoRAs with different seeds, and their average as the result of the run (`--members`).

Members are runs of their own in `member-N/`. Those that are finished are kept: the same command goes on from there.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from flatlora_diffusion.adapter.delta import Update, Updates
from flatlora_diffusion.adapter.layers import ADAPTER, lora_layers
from flatlora_diffusion.adapter.setup import adapted_models, start_from
from flatlora_diffusion.config import RunError, StoppedError, TrainConfig
from flatlora_diffusion.data.class_images import load_class_samples
from flatlora_diffusion.data.dataset import Sample, SampleSet
from flatlora_diffusion.data.sources import hold_out, load_training_set
from flatlora_diffusion.lora_files.safe_reading import read_header
from flatlora_diffusion.lora_tools.averaging import Average, average_updates
from flatlora_diffusion.sdxl.device import this_process
from flatlora_diffusion.storage.rng import derive_seed
from flatlora_diffusion.storage.run_dir import LORA_FILE, RunDir
from flatlora_diffusion.training.failure import explained
from flatlora_diffusion.training.finish import present, save_result
from flatlora_diffusion.training.holdout import HeldoutLoss
from flatlora_diffusion.training.holdout_folds import is_same_run
from flatlora_diffusion.training.previews import Previews
from flatlora_diffusion.training.resolve_config import check_early, new_or_resumed, seeded
from flatlora_diffusion.training.state import TrainState, prepare, put_away
from flatlora_diffusion.training.stopping import Interrupted

logger = logging.getLogger(__name__)

TrainOne = Callable[[TrainConfig, RunDir, SampleSet], Path]
STRENGTHS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
"""Of the average, among which held-out images choose."""
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_GO_ON = "the same command goes on from there"


def train_members(given: TrainConfig, run: RunDir, train_one: TrainOne) -> Path:
    """Train all members and save their average; returns the path of diffusers' LoRA file.

    `train_one` trains a member in a folder of its own. Raises what a training raises, StoppedError for a stop.
    """
    began = time.monotonic()
    config = new_or_resumed(with_first_seed(given, run), run)
    if this_process().is_main_process:
        run.clean()
    check_early(config)
    found = load_training_set(config.data)
    ours, theirs = hold_out(found.samples, config.data.holdout_images)
    planned = member_configs(config, run)
    for number, mine in enumerate(planned, 1):
        inner, where = run.member(number), f"member {number} of {len(planned)}"
        if _is_finished(inner, mine) and is_same_run(inner, mine, ours, theirs):
            logger.info("%s: already trained in %s", where, inner.folder)
            continue
        logger.info("%s: trains with seed %d", where, mine.run.seed)
        _train_one(_with_time_left(mine, began), inner, found, train_one, where)
        _check_stop(run, where)
    return _save_average(config, run, planned, ours, theirs)


def member_configs(config: TrainConfig, run: RunDir) -> list[TrainConfig]:
    """The settings of each member of a run that has a seed: the first has the run's, others have seeds made of it.

    A member draws no previews and uploads nothing.
    """
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
            push_to_hub=False,
        )
        for number, seed in enumerate(seeds, 1)
    ]


def with_first_seed(config: TrainConfig, run: RunDir) -> TrainConfig:
    """A seed that was drawn for the first member is the run's."""
    first = run.member(1)
    if config.run.seed is not None or not first.config_file.is_file():
        return seeded(config)
    return config.replace(seed=first.config()["seed"])


def _is_finished(inner: RunDir, config: TrainConfig) -> bool:
    ending = inner.ending() if inner.events_file.is_file() else None
    steps = config.optim.max_train_steps
    is_whole = ending is not None and ending["event"] == "finished" and (inner.folder / LORA_FILE).is_file()
    return is_whole and (steps is None or inner.config().get("max_train_steps") == steps)


def _train_one(config: TrainConfig, inner: RunDir, found: SampleSet, train_one: TrainOne, where: str) -> None:
    """Train a member, or go on with it. What ends it says in which member that was."""
    if inner.checkpoints() and not inner.changed_settings(config):
        config = config.replace(resume_from_checkpoint="latest")
    if this_process().is_main_process:
        inner.folder.mkdir(parents=True, exist_ok=True)
    try:
        train_one(config, inner, found)
    except StoppedError as error:
        raise StoppedError(f"{where}: {str(error).partition('; ')[0]}; {_GO_ON}") from error
    except RunError as error:
        raise RunError(f"{where}: {error}") from error
    except Interrupted as error:
        raise Interrupted(error.number, f"in {where}; {_GO_ON}") from error


def _check_stop(run: RunDir, where: str) -> None:
    if run.stop_file.exists():
        raise StoppedError(f"stopped after {where} by the stop file; {_GO_ON}")


def _with_time_left(config: TrainConfig, began: float) -> TrainConfig:
    """--max_train_seconds is for all members together."""
    most = config.optim.max_train_seconds
    return config if most is None else config.replace(max_train_seconds=max(1.0, most - (time.monotonic() - began)))


def _save_average(
    config: TrainConfig,
    run: RunDir,
    planned: Sequence[TrainConfig],
    ours: Sequence[Sample],
    theirs: Sequence[Sample],
) -> Path:
    """Average the members and end the run with the result, as a run that trained it would end."""
    files = [run.member(number).folder / LORA_FILE for number in range(1, len(planned) + 1)]
    rank = sum(_rank(file) for file in files)
    rank = rank if config.average.average_rank is None else min(rank, config.average.average_rank)
    with explained(config):
        state = prepare(_of_plain_lora(config, rank), ours, load_class_samples(config))
    try:
        with explained(state.config):
            state.progress.config = _settled(config, state)
            previews = Previews(state) if state.accelerator.is_main_process else None
            if previews is not None:
                _start(run, state.config)
                previews.make("base", 0)
            average = average_updates([_updates(file) for file in files], [1 / len(files)] * len(files), rank)
            start_from(state.sdxl.pipeline, _of_rank(average.updates, rank), {})
            strength, losses = _best_strength(state, theirs) if theirs else (1.0, {})
            _scale(state, strength)
            _record(state, run, planned, average, rank, strength, losses)
            path = save_result(state)
        if config.average.remove_members and state.accelerator.is_main_process:
            for number in range(1, len(planned) + 1):
                shutil.rmtree(run.member(number).folder)
        if previews is not None:
            present(state, previews)
        state.accelerator.wait_for_everyone()
    finally:
        put_away(state)
    return path


def _start(run: RunDir, config: TrainConfig) -> None:
    """Make the run's folder, with the images, the base and the first weights of its first member."""
    first = run.member(1)
    run.start(config.to_dict(), first.manifest())
    run.add_event(next(event for event in first.events() if event["event"] == "start"))


def _rank(file: Path) -> int:
    """The highest rank of a file for diffusers."""
    return max(entry.shape[0] for name, entry in read_header(file).entries.items() if name.endswith(_DOWN))


def _updates(file: Path) -> Updates:
    """What a run's file for diffusers adds to each layer: its names are parts and module paths, its scale is in B."""
    checked = read_header(file)
    updates: dict[str, dict[str, Update]] = {}
    for name in checked.entries:
        if name.endswith(_DOWN):
            part, _, module = name.removesuffix(_DOWN).partition(".")
            up = checked.tensor(name.replace(_DOWN, _UP)).float()
            updates.setdefault(part, {})[module] = Update(checked.tensor(name).float(), up, 1.0)
    return updates


def _of_plain_lora(config: TrainConfig, rank: int) -> TrainConfig:
    """Settings with which the same layers have a plain LoRA of this rank and scale 1, whatever the members were."""
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


def _settled(config: TrainConfig, state: TrainState) -> TrainConfig:
    """The run's own settings with what the state has settled."""
    settled = state.config
    return config.replace(
        resolution=settled.data.resolution,
        max_train_steps=settled.optim.max_train_steps,
        mixed_precision=settled.optim.mixed_precision,
    )


def _of_rank(updates: Updates, rank: int) -> Updates:
    """The same updates with factors of exactly this rank: zeros are added where a layer has fewer."""
    return {
        part: {module: _padded(update, rank - len(update.down)) for module, update in layers.items()}
        for part, layers in updates.items()
    }


def _padded(update: Update, missing: int) -> Update:
    down, up = update.down, update.up
    # Pads are counted from the last axis: A's rank is its first, B's its second.
    return Update(
        F.pad(down, (*[0, 0] * (down.ndim - 1), 0, missing)),
        F.pad(up, (*[0, 0] * (up.ndim - 2), 0, missing)),
        update.scale,
    )


def _best_strength(state: TrainState, samples: Sequence[Sample]) -> tuple[float, dict[float, float]]:
    """The strength at which the held-out images' loss is lowest, and the loss at each."""
    heldout, losses = HeldoutLoss(state, samples), {}
    for strength in STRENGTHS:
        _scale(state, strength)
        losses[strength] = heldout.now()
        _scale(state, 1 / strength)
    best = min(losses, key=lambda strength: losses[strength])
    said = ", ".join(f"{strength:g}: {loss:.4f}" for strength, loss in losses.items())
    logger.info("loss of the held-out images by the average's strength: %s; it is saved at %g", said, best)
    return best, losses


@torch.no_grad()
def _scale(state: TrainState, strength: float) -> None:
    """Multiply what the LoRA adds to the weights."""
    for model in adapted_models(state.sdxl.pipeline, state.config.adapter).values():
        for layer in lora_layers(model).values():
            layer.lora_B[ADAPTER].weight.mul_(strength)


def _record(
    state: TrainState,
    run: RunDir,
    planned: Sequence[TrainConfig],
    average: Average,
    rank: int,
    strength: float,
    losses: dict[float, float],
) -> None:
    """Say in the run's events, and to the files that follow, what the result is made of."""
    seeds = [config.run.seed for config in planned]
    at = "" if strength == 1 else f" at strength {strength:g}"
    state.progress.average = f"average of {len(planned)} LoRAs{at}, seeds {', '.join(map(str, seeds))}, rank {rank}"
    if average.lost:
        logger.info("the cut to rank %d loses %.3g %% of the average", rank, 100 * average.lost)
    if not state.accelerator.is_main_process:
        return
    for number in range(len(planned)):  # one after the other, as they were taken
        for event in run.member(number + 1).steps():
            run.add_event({**event, "step": event["step"] + number * state.total_steps})
    facts = {"members": len(planned), "seeds": seeds, "rank": rank, "lost": average.lost, "strength": strength}
    by_strength = {f"{at:g}": loss for at, loss in losses.items()}
    run.add_event({"event": "average", **facts, "heldout_losses": by_strength})
