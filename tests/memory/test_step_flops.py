"""What README and docs/gpu.md say of time follows from the FLOPs of a step, counted on `meta`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.config import TrainConfig, preset_file
from flatlora_diffusion.sdxl.shapes import on_meta

ROOT = Path(__file__).parents[2]
SHARE = 0.4  # of a card's peak
STEPS = 500  # of the README's command
CARDS: dict[str, tuple[float, dict[str, Any], str]] = {
    "RTX 4060": (30.2, {"preset": "low_memory"}, "53 minutes"),
    "RTX 3060": (25.5, {}, "16 minutes"),
    "RTX 4060 Ti": (44.1, {"members": 3}, "27 minutes"),
    "RTX 3090": (71.2, {"preset": "quality"}, "2.2 hours"),
}


def teraflops(checkpointing: bool) -> float:
    """Of forward and backward of SDXL's UNet with its LoRA at 1024 pixels, batch 1."""
    base = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0", "rank": 4}
    config = TrainConfig.from_dict(base)
    unet = on_meta(config.model, "unet").train()
    add_lora(unet, config.adapter, 0)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        sample = torch.empty(1, 4, 128, 128)
        output = unet(sample, torch.ones(1), torch.empty(1, 77, 2048), added_cond_kwargs=added).sample
        output.sum().backward()
    return counter.get_total_flops() / 1e12


@pytest.mark.slow
def test_the_times_of_the_readme_are_arithmetic_on_the_flops_of_a_step() -> None:
    of_step, page = teraflops(checkpointing=True), (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert f"{of_step:.1f} TFLOP ({teraflops(checkpointing=False):.1f} without checkpointing" in " ".join(page.split())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for card, (peak, flags, time) in CARDS.items():
        config = TrainConfig()
        if "preset" in flags:
            config = config.updated_from(preset_file(flags["preset"]))
        optim, members = config.optim, flags.get("members", config.average.trainings)
        steps = optim.max_train_steps or STEPS
        samples = optim.gradient_accumulation_steps * (optim.train_batch_size if "preset" in flags else 1)
        seconds = members * steps * samples * of_step / (SHARE * peak)
        said = f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
        assert said == time
        assert f"| {time} ({card}) |" in readme
        assert f"| {peak} | {of_step / (SHARE * peak):.1f} s | {time} |" in page
