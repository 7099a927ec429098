"""Train three steps on random weights for their self-check: no downloads, no files left behind."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from flatlora_diffusion.config import SAMPLES, SDXL, TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.families.device import has_bf16, this_process
from flatlora_diffusion.families.registry import random_base
from flatlora_diffusion.training.failure import friendly_errors
from flatlora_diffusion.training.first_gradients import start_from_gradients
from flatlora_diffusion.training.selfcheck import STEPS, Check, SelfCheck
from flatlora_diffusion.training.state import prepare, set_backends
from flatlora_diffusion.training.trainer import train_step

CHECK_RHO_RISE = 0.02  # small: the loss of random weights follows its gradient less far than that of trained ones


def run_gpu_check(config: TrainConfig) -> list[Check]:
    """Train the first steps of `config` on the sample icons, with random weights in the shapes of its base.

    Returns the results of the self-check. Raises RunError if the device is out of memory.
    """
    images = SAMPLES / "icons_3d"
    with tempfile.TemporaryDirectory() as folder:
        config = config.replace(
            instance_data_dir=str(images), output_dir=folder, max_train_steps=STEPS, seed=0, report_to="none"
        )
        set_backends(config)
        with friendly_errors(config):
            state = prepare(config, load_samples(Path(images)).samples, load=random_base)
            try:
                start_from_gradients(state)
                check = SelfCheck(state)
                check.begin()
                for step in range(STEPS):
                    step_start = time.monotonic()
                    loss = train_step(state, step)
                    check.step_done(loss, time.monotonic() - step_start)
            finally:
                state.close()
    return check.checks


def gpu_check_configs() -> tuple[TrainConfig, TrainConfig]:
    """The paper's Flat-LoRA settings on SDXL in the precision that the GPU supports, and the same for SAM."""
    device = this_process().device
    config = TrainConfig().replace(
        pretrained_model_name_or_path=SDXL,
        resolution=1024,
        train_batch_size=1,
        mixed_precision="bf16" if device.type == "cuda" and has_bf16(device) else "fp16",
        gradient_checkpointing=True,
        cache_latents=True,
    )
    return config.replace(perturb_per="step"), config.replace(method="sam", rho_rise=CHECK_RHO_RISE)
