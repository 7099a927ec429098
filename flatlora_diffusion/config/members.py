"""Settings of a run that trains several LoRAs and saves their average."""

from __future__ import annotations

from dataclasses import dataclass

from flatlora_diffusion.config.setting import Section, setting


@dataclass(frozen=True)
class MembersConfig(Section):
    """How many LoRAs a run trains and averages, and what stays of them."""

    members: int | None = setting(
        None,
        "train this many LoRAs with different seeds, one after the other, and save their average: so many times the "
        "time, the memory of one; --holdout_images choose its strength",
        min=2,
        max=64,
        before=None,
        moves="draws",
    )
    average_rank: int | None = setting(
        None,
        "cut the average to this rank by SVD; default: --members times --rank, which is exact, in a file that much "
        "larger",
        min=1,
        max=1024,
        before=None,
    )
    remove_members: bool = setting(
        False, "remove the folders of the members once their average is saved", before=False, free_on_resume=True
    )

    @property
    def trainings(self) -> int:
        """How many LoRAs the run trains."""
        return self.members or 1
