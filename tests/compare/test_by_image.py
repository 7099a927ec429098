"""What a comparison says of each training image: from the events of its runs, with thumbnails of its own."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from tiny_runs import samples_of

from flatlora_diffusion.compare.arms import Arm, PlannedRun
from flatlora_diffusion.compare.by_image import by_image
from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.training.trainer import train


def trained(config: TrainConfig, key: str) -> PlannedRun:
    train(config)
    return PlannedRun(Arm(key, key, "arm", "flat-lora"), 3, config)


def test_each_arm_has_its_changes_up_to_its_result_and_none_of_images_it_held_out(
    config: TrainConfig, tmp_path: Path
) -> None:
    config = config.replace(image_loss_draws=2, checkpointing_steps=1, max_train_steps=2)
    whole = trained(config, "whole")
    held = trained(config.replace(holdout_images=1, output_dir=str(tmp_path / "held")), "held")
    whole.run.add_event({"event": "image_losses", "step": 9, "losses": {}})
    samples = samples_of(config)
    pictures = [Image.new("RGB", (32, 32), (80 * index, 0, 0)) for index in range(3)]
    found = by_image([whole, held], samples, pictures, tmp_path)
    assert [image["name"] for image in found["images"]] == [sample.id for sample in samples]
    assert [image["caption"] for image in found["images"]] == [sample.caption for sample in samples]
    assert found["arms"]["whole"]["steps"] == [0, 1, 2]
    assert None not in found["arms"]["whole"]["images"]
    assert found["arms"]["held"]["steps"][-1] == held.last_step
    assert found["arms"]["held"]["images"].count(None) == 1
    for index, image in enumerate(found["images"]):
        with Image.open(tmp_path / image["file"]) as thumbnail:
            assert thumbnail.getpixel((0, 0)) == (80 * index, 0, 0)
    assert str(tmp_path) not in str(found)


def test_unmeasured_runs_have_no_rows(config: TrainConfig, tmp_path: Path) -> None:
    planned = trained(config.replace(max_train_steps=1), "plain")
    assert by_image([planned], samples_of(config), [], tmp_path) == {}
    assert not (tmp_path / "training_images").exists()
