"""Images of the user's own that a run does not train on, so that it can see when it has learned enough."""

from __future__ import annotations

from collections.abc import Sequence

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.data.dataset import Sample


def held_out(samples: Sequence[Sample], count: int) -> tuple[list[Sample], list[Sample]]:
    """The images to train on, and `count` that are not, both in their order.

    Their contents choose them, as good as by chance: all seeds and arms of a comparison leave out the same ones.
    Raises ConfigError when nothing is left to train on.
    """
    if count and count >= len(samples):
        raise ConfigError(
            f"holdout_images={count} leaves none of the {len(samples)} images to train on; give a lower number"
        )
    away = {id(sample) for sample in sorted(samples, key=lambda sample: (sample.sha256, sample.id))[:count]}
    return (
        [sample for sample in samples if id(sample) not in away],
        [sample for sample in samples if id(sample) in away],
    )
