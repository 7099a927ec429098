"""A member of an average that another run of the comparison has trained already is copied, not trained again."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence

from flatlora_diffusion.compare.arms import PlannedRun
from flatlora_diffusion.training.members import member_configs
from flatlora_diffusion.training.resolve_config import is_made_with

logger = logging.getLogger(__name__)


def lend_members(planned: PlannedRun, runs: Sequence[PlannedRun]) -> None:
    """Copy each member of `planned` that one of the finished `runs` is, bit for bit, into the run's folder.

    The first member has the run's seed, so the same method without --members has trained it.
    """
    if planned.config.average.members is None or planned.is_finished:
        return
    for number, config in enumerate(member_configs(planned.config, planned.run), 1):
        inner = planned.run.member(number)
        if inner.folder.exists():
            continue
        for other in runs:
            if other.is_finished and is_made_with(other.run, config):
                logger.info("%s: member %d is %s, which is trained", planned.label, number, other.label)
                half = inner.folder.with_name(f"{inner.folder.name}.copied")
                shutil.rmtree(half, ignore_errors=True)
                shutil.copytree(other.run.folder, half, ignore=shutil.ignore_patterns("checkpoint-*"))
                half.replace(inner.folder)
                break
