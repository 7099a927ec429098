"""What README and docs/gpu.md say of time follows from the FLOPs of a step, counted on `meta`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flatlora_diffusion.adapter.lora import add_lora
from flatlora_diffusion.commands.train_flags import EVIDENCE, parse_comparison
from flatlora_diffusion.compare.evidence import options_of
from flatlora_diffusion.compare.evidence_defaults import DEFAULTS, PARTS
from flatlora_diffusion.compare.experiment import read_experiment
from flatlora_diffusion.config import EvidenceConfig, ModelConfig, TrainConfig, preset_file
from flatlora_diffusion.families.sdxl.shapes import on_meta

ROOT = Path(__file__).parents[2]
SHARE = 0.4  # of a card's peak
T4 = 65.0  # TFLOP/s, fp16 with fp32 sums
SDXL = ModelConfig(pretrained_model_name_or_path="stabilityai/stable-diffusion-xl-base-1.0")
STEPS, MEMBERS = 500, 3  # of the README's command
CARDS = {
    "RTX 4060": (30.2, 13, 40),
    "RTX 3060": (25.5, 16, 47),
    "RTX 4060 Ti": (44.1, 9, 27),
    "RTX 3090": (71.2, 6, 17),
}


def teraflops(checkpointing: bool) -> float:
    """Of forward and backward of SDXL's UNet with its LoRA at 1024 pixels, batch 1."""
    base = {"pretrained_model_name_or_path": "stabilityai/stable-diffusion-xl-base-1.0", "rank": 16}
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


@pytest.mark.long
def test_the_times_of_the_readme_are_arithmetic_on_the_flops_of_a_step() -> None:
    of_step, page = teraflops(checkpointing=True), (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert f"{of_step:.1f} TFLOP ({teraflops(checkpointing=False):.1f} without checkpointing" in " ".join(page.split())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for card, (peak, single, average) in CARDS.items():
        seconds = of_step / (SHARE * peak)
        assert (round(STEPS * seconds / 60), round(MEMBERS * STEPS * seconds / 60)) == (single, average)
        assert f"({card}) |" in readme
        assert f"GiB | {single} minutes | {average} minutes |" in readme
        assert f"| {peak} | {seconds:.1f} s | {single} minutes | {average} minutes |" in page
    quality = TrainConfig().updated_from(preset_file("quality"))
    passes = quality.average.trainings * (quality.optim.max_train_steps or 0) * quality.optim.train_batch_size
    assert f"is {passes * of_step / (SHARE * CARDS['RTX 3090'][0]) / 3600:.1f} hours on an RTX 3090" in page


def forward_teraflops() -> float:
    """Of a pass of one sample through SDXL's UNet at 1024 pixels."""
    unet = on_meta(SDXL, "unet").eval()
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        unet(torch.empty(1, 4, 128, 128), torch.ones(1), torch.empty(1, 77, 2048), added_cond_kwargs=added)
    return counter.get_total_flops() / 1e12


@pytest.mark.long
def test_the_minutes_of_evidence_are_arithmetic_on_its_passes(tmp_path: Path) -> None:
    """The passes of a comparison do not depend on the size of its base."""
    own = ["--encoders", "judge", "--resolution", "64", "--seed", "0", "--output_dir", str(tmp_path)]
    config, options = parse_comparison(EVIDENCE, DEFAULTS, own, EvidenceConfig())
    of_step, of_pass, steps = teraflops(checkpointing=True), forward_teraflops(), config.optim.max_train_steps or 0
    minutes, trainings = [], (2, 4)  # an average of three shares a member with the LoRA
    for part, count in zip(PARTS, trainings, strict=False):
        experiment = read_experiment(config, options_of(part, options))
        evaluator, _ = experiment.evaluator([])
        passes = sum(item.passes for item in experiment.measurement_items(evaluator))
        work = count * steps * of_step, passes * of_pass
        minutes.append([round(teraflop / (SHARE * T4) / 60) for teraflop in (work[0], sum(work))])
    (training, two_arms), (_, with_average) = minutes
    page = " ".join((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split())
    text = (
        f"the two arms take {two_arms} minutes, of which {training} are training, and with the average {with_average}"
    )
    assert f"At 40 % of a T4's {T4:g} TFLOP/s {text} minutes" in page
    assert 45 <= two_arms <= 75, "about an hour, as README and notebook say"
