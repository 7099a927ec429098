"""Members of an average (`--members`): trained in parallel before `train` averages them, or copied from other runs."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from flatlora_diffusion.compare.arms import Arm, PlannedRun
from flatlora_diffusion.compare.parallel import train_in_parallel
from flatlora_diffusion.compare.worker_slots import check_workers
from flatlora_diffusion.config import ConfigError, TrainConfig, WorkersConfig
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.run_lock import lock_folder
from flatlora_diffusion.training.members import member_configs, with_first_seed
from flatlora_diffusion.training.resolve_config import is_made_with

logger = logging.getLogger(__name__)


def train_members_in_parallel(config: TrainConfig, workers: WorkersConfig) -> TrainConfig:
    """Train every unfinished member, and return the settings with the run's seed. Raises as a training does."""
    check_workers(workers.workers, workers.cluster)
    if config.optim.max_train_steps is None:
        raise ConfigError("--workers and --cluster need --max_train_steps, so that all members train equally long")
    folder = Path(config.run.output_dir)
    with lock_folder(folder, "output_dir"):
        run = RunDir(folder)
        config = with_first_seed(config, run)
        planned = [
            PlannedRun(
                Arm(f"member-{number}", f"member {number}", "arm", member.perturb.method), member.run.seed or 0, member
            )
            for number, member in enumerate(member_configs(config, run), 1)
        ]
        train_in_parallel(planned, workers.workers, workers.cluster)
    return config


def copy_shared_members(planned: PlannedRun, runs: Sequence[PlannedRun]) -> None:
    """Copy the members of `planned` that equal one of the finished `runs` into its folder.

    The first member has the run's seed, so a run of the same method without --members equals it.
    """
    if planned.config.average.members is None or planned.is_finished:
        return
    for number, config in enumerate(member_configs(planned.config, planned.run), 1):
        member = planned.run.member(number)
        if member.folder.exists():
            continue
        for other in runs:
            if other.is_finished and is_made_with(other.run, config):
                logger.info("%s: copying member %d from %s", planned.label, number, other.label)
                temporary = member.folder.with_name(f"{member.folder.name}.copied")
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(other.run.folder, temporary, ignore=shutil.ignore_patterns("checkpoint-*"))
                temporary.replace(member.folder)
                break
