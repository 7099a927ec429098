"""The members of one run's average (`--members`) trained at once; `train` then finds them there and averages them."""

from __future__ import annotations

from pathlib import Path

from flatlora_diffusion.compare.arms import Arm, PlannedRun
from flatlora_diffusion.compare.parallel import train_at_once
from flatlora_diffusion.compare.worker_slots import check_places
from flatlora_diffusion.config import ConfigError, TrainConfig, WorkersConfig
from flatlora_diffusion.storage.run_dir import RunDir
from flatlora_diffusion.storage.run_lock import lock_folder
from flatlora_diffusion.training.members import member_configs, with_first_seed


def train_members_at_once(given: TrainConfig, own: WorkersConfig) -> TrainConfig:
    """Train every member that is not trained yet, and return the settings with the run's seed.

    Raises ConfigError for settings that cannot be, RunError when a member does not end well.
    """
    check_places(own.workers, own.cluster)
    if given.optim.max_train_steps is None:
        raise ConfigError("--workers and --cluster need --max_train_steps, so that all members have the same")
    folder = Path(given.run.output_dir)
    with lock_folder(folder, "output_dir"):
        run = RunDir(folder)
        config = with_first_seed(given, run)
        planned = [
            PlannedRun(
                Arm(f"member-{number}", f"member {number}", "arm", mine.perturb.method), mine.run.seed or 0, mine
            )
            for number, mine in enumerate(member_configs(config, run), 1)
        ]
        train_at_once(planned, own.workers, own.cluster)
    return config
