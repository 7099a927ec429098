"""The tiny klein base in this program: its name, its length of prompts, and what a short training does to its loss."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flatlora_diffusion.config import SAMPLES, TINY_KLEIN, ModelConfig, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.evaluation.probe import draw_losses, fixed_probe
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.klein.labels import TINY_LABELS
from flatlora_diffusion.families.registry import base_title, load_base
from flatlora_diffusion.lora_files.loading import lora_scale, loras_loaded
from flatlora_diffusion.lora_files.paths import LoraFile
from flatlora_diffusion.storage.model_paths import available_bases
from flatlora_diffusion.training.trainer import train

pytestmark = pytest.mark.skipif(TINY_KLEIN not in available_bases(), reason="samples/tiny_klein has no weights yet")
ICONS = SAMPLES / "icons_3d"


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(ModelConfig(TINY_KLEIN), torch.device("cpu"), torch.float32)


def test_it_is_named_and_takes_the_captions_of_the_sample_icons_whole(base: Base) -> None:
    assert base.labels == TINY_LABELS
    assert base_title(ModelConfig(TINY_KLEIN)) == "the tiny klein base, 64 pixels"
    captions = [sample.caption for sample in load_samples(ICONS).samples]
    assert max(map(base.count_tokens, captions)) <= base.max_tokens < 64, "longer padding costs time"


def test_twenty_steps_lower_the_loss_of_the_style(base: Base, tmp_path: Path) -> None:
    probe = fixed_probe(base, load_samples(ICONS).samples, base.resolution, seed=0, draws=2)
    before = draw_losses(base.denoiser, base.objective(), probe).mean()
    settings = {
        "pretrained_model_name_or_path": TINY_KLEIN,
        "instance_data_dir": str(ICONS),
        "output_dir": str(tmp_path / "run"),
        "max_train_steps": 20,
        "train_batch_size": 4,
        "learning_rate": 2e-3,
        "cache_latents": True,
        "seed": 0,
        "report_to": "none",
    }
    files = [LoraFile(train(TrainConfig.from_dict(settings)))]
    with loras_loaded(base.pipeline, files), lora_scale(base.pipeline, files, 1.0, merge=True):
        after = draw_losses(base.denoiser, base.objective(), probe).mean()
    assert after < 0.99 * before
