"""The tiny base tells wrong captions of the sample icons from right ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flatlora_diffusion.config import SAMPLES, TINY, TrainConfig
from flatlora_diffusion.data.dataset import Sample, load_samples
from flatlora_diffusion.evaluation.image_changes import image_changes
from flatlora_diffusion.training.image_losses import ImageLosses
from flatlora_diffusion.training.state import prepare

DRAWS = 8


def doubtful(samples: list[Sample], folder: Path) -> list[str]:
    """The images whose captions are doubtful to the untrained base."""
    values = {
        "pretrained_model_name_or_path": TINY,
        "instance_data_dir": "icons",
        "output_dir": str(folder),
        "max_train_steps": 1,
        "image_loss_draws": DRAWS,
        "report_to": "none",
        "seed": 0,
    }
    folder.mkdir()
    state = prepare(TrainConfig.from_dict(values), samples)
    ImageLosses(state, 0).measure(1)
    changes = image_changes([state.run.image_losses()])
    state.close()
    assert changes is not None
    return [image.name for image in changes.images if image.has_doubtful_caption]


@pytest.mark.long
def test_exchanged_captions_are_doubtful_and_the_right_ones_are_not(tmp_path: Path) -> None:
    samples = load_samples(SAMPLES / "icons_3d").samples
    others = [*samples[3:], *samples[:3]]
    wrong = [replace(sample, caption=other.caption) for sample, other in zip(samples, others, strict=True)]
    assert doubtful(samples, tmp_path / "right") == []
    assert len(doubtful(wrong, tmp_path / "wrong")) >= len(samples) - 1
