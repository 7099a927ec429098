"""Losses by set and group, of the base and of a LoRA at a strength; measured once for each content of a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flatlora_diffusion.compare.losses import UNGROUPED, ImageSet, LossEvaluator, groups_of
from flatlora_diffusion.config import RunError
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.evaluation.probe import fixed_probe, probe_loss, probe_losses
from flatlora_diffusion.families.sdxl.objective import SdxlObjective
from flatlora_diffusion.families.sdxl.pipeline import Sdxl


@pytest.fixture
def evaluator(sdxl: Sdxl, icons: Path, tmp_path: Path) -> LossEvaluator:
    sets = {"icons": ImageSet(load_samples(icons).samples, ["a", "b", "a"], draws=2)}
    return LossEvaluator(sdxl, SdxlObjective(sdxl.scheduler), sets, 32, tmp_path / "kept")


def test_the_loss_of_a_group_is_the_mean_of_its_images(evaluator: LossEvaluator, sdxl: Sdxl, icons: Path) -> None:
    probe = fixed_probe(sdxl, load_samples(icons).samples, 32, 0, 2)
    each = probe_losses(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe)
    found = evaluator.losses(None)["icons"]
    assert found == pytest.approx(
        {UNGROUPED: float(each.mean()), "a": float(each[[0, 2]].mean()), "b": float(each[1])}, abs=1e-12
    )


def test_a_lora_is_loaded_at_its_strength_and_removed_afterwards(
    evaluator: LossEvaluator, sdxl: Sdxl, lora: Path
) -> None:
    base, half, full = evaluator.losses(None), evaluator.losses(lora, 0.5), evaluator.losses(lora)
    assert len({base["icons"][UNGROUPED], half["icons"][UNGROUPED], full["icons"][UNGROUPED]}) == 3
    assert evaluator.losses(lora, 0.0)["icons"][UNGROUPED] == pytest.approx(base["icons"][UNGROUPED], abs=1e-6)
    probe = fixed_probe(sdxl, evaluator.sets["icons"].samples, 32, 0, 2)
    assert probe_loss(sdxl.denoiser, SdxlObjective(sdxl.scheduler), probe) == base["icons"][UNGROUPED]


def test_captions_are_read_as_in_training(evaluator: LossEvaluator, sdxl: Sdxl, tmp_path: Path) -> None:
    skipping = replace(sdxl, clip_skip=1)
    objective = SdxlObjective(sdxl.scheduler)
    found = LossEvaluator(skipping, objective, evaluator.sets, 32, tmp_path / "kept").losses(None)["icons"][UNGROUPED]
    assert found == probe_loss(
        sdxl.denoiser, objective, fixed_probe(skipping, evaluator.sets["icons"].samples, 32, 0, 2)
    )
    assert found != pytest.approx(evaluator.losses(None)["icons"][UNGROUPED], rel=1e-5)


def test_measurements_are_reused_until_the_file_changes(
    evaluator: LossEvaluator, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(lora.read_bytes())
    first = evaluator.losses(copy)
    (kept,) = (tmp_path / "kept").iterdir()
    of_images = json.loads(kept.read_text(encoding="utf-8"))["icons"]
    assert sum(of_images.values()) / 3 == pytest.approx(first["icons"][UNGROUPED])
    monkeypatch.setattr(evaluator, "_by_image", lambda name: pytest.fail("measured again"))
    assert evaluator.losses(lora) == first, "the same content under another name"
    monkeypatch.setattr(evaluator, "_by_image", lambda name: {"0": 1.0, "1": 2.0, "2": 6.0})
    assert evaluator.losses(copy, 0.5) == {"icons": {UNGROUPED: 3.0, "a": 3.5, "b": 2.0}}


def test_there_is_one_repeatable_rise_per_draw(
    evaluator: LossEvaluator, sdxl: Sdxl, lora: Path, tmp_path: Path
) -> None:
    rises = evaluator.loss_increases(lora, "icons", 0.3, 3)
    assert len(set(rises)) == 3
    again = LossEvaluator(sdxl, SdxlObjective(sdxl.scheduler), evaluator.sets, 32, tmp_path / "other")
    assert again.loss_increases(lora, "icons", 0.3, 3) == rises


def test_groups_come_from_the_metadata(icons: Path, tmp_path: Path) -> None:
    samples = load_samples(icons).samples
    assert groups_of(tmp_path, samples) == [UNGROUPED] * 3
    row = {"file_name": samples[1].id, "text": "x", "group": "faces"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n\n", encoding="utf-8")
    assert groups_of(tmp_path, samples) == [UNGROUPED, "faces", UNGROUPED]


def test_losses_that_overflow_in_fp16_are_an_error_and_not_cached(
    sdxl: Sdxl, evaluator: LossEvaluator, icons: Path, tmp_path: Path
) -> None:
    evaluator.losses(None)
    before = list((tmp_path / "kept").iterdir())
    for part in (sdxl.pipeline.unet, *sdxl.text_encoders.values()):
        part.half()
    sdxl.pipeline.unet.conv_out.bias.data += 65504  # the largest number of fp16
    sdxl.pipeline.unet.conv_out.weight.data *= 1000
    overflowing = LossEvaluator(sdxl, SdxlObjective(sdxl.scheduler), evaluator.sets, 32, tmp_path / "kept")
    with pytest.raises(RunError, match=r"the base .* icons .* float16.*--mixed_precision"):
        overflowing.losses(None)
    assert list((tmp_path / "kept").iterdir()) == before
