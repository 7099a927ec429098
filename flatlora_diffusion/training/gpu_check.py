"""Three steps on random weights, for their self-check alone: nothing is downloaded, nothing kept."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from flatlora_diffusion.config import SAMPLES, SDXL, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.sdxl.device import this_process
from flatlora_diffusion.sdxl.random_base import random_sdxl
from flatlora_diffusion.training.failure import explained
from flatlora_diffusion.training.first_steps import STEPS, SelfCheck
from flatlora_diffusion.training.first_steps_measures import Check
from flatlora_diffusion.training.first_weights import first_weights
from flatlora_diffusion.training.state import prepare, put_away, set_backends
from flatlora_diffusion.training.trainer import train_step


def drill(config: TrainConfig) -> list[Check]:
    """Train the first steps of `config` on the sample icons, with random weights in the shapes of its base.

    Raises RunError when the device is out of memory.
    """
    images = SAMPLES / "icons_3d"
    with tempfile.TemporaryDirectory() as folder:
        own = config.replace(
            instance_data_dir=str(images), output_dir=folder, max_train_steps=STEPS, seed=0, report_to="none"
        )
        set_backends(own)
        with explained(own):
            state = prepare(own, load_samples(Path(images)).samples, load=random_sdxl)
            try:
                first_weights(state)
                check = SelfCheck(state)
                check.begin()
                for step in range(STEPS):
                    began = time.monotonic()
                    loss = train_step(state, step)
                    check.step_done(loss, time.monotonic() - began)
            finally:
                put_away(state)
    return check.checks


DRILL_RISE = 0.02


def drill_configs() -> tuple[TrainConfig, TrainConfig]:
    """What a person with a GPU trains first: the paper's setting on SDXL, in the precision that the GPU has, and SAM.

    Random weights follow their gradient less far than trained ones, so SAM's rise is a small one.
    """
    is_new = this_process().device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    both = TrainConfig().replace(
        pretrained_model_name_or_path=SDXL,
        resolution=1024,
        train_batch_size=1,
        mixed_precision="bf16" if is_new else "fp16",
        gradient_checkpointing=True,
        cache_latents=True,
    )
    return both.replace(perturb_per="step"), both.replace(method="sam", rho_rise=DRILL_RISE)
