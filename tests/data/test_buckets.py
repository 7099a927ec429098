"""Aspect-ratio buckets: whole steps of the base, near the image's shape and the area asked for."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.schedule import bucket_sizes
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


def test_a_bucket_has_the_shape_of_the_image_and_about_the_area_of_the_square() -> None:
    shapes = [(500, 500), (300, 500), (600, 400)]
    sizes = bucket_sizes(shapes, 1024, 32)
    assert sizes[0] == (1024, 1024)
    for (height, width), (tall, wide) in zip(shapes, sizes, strict=True):
        assert tall % 32 == wide % 32 == 0
        assert abs(tall / wide - height / width) / (height / width) < 0.1
        assert 0.8 < tall * wide / 1024**2 < 1.1
    assert bucket_sizes([(900, 300)], 1024, 32) == [(1440, 736)]  # none is narrower than about 1 to 2


def test_buckets_keep_the_shape_of_each_image(config: TrainConfig, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    for index, size in enumerate([(64, 64), (128, 64), (64, 128), (130, 64)]):
        Image.new("RGB", size, "blue").save(folder / f"{index}.png")
    buckets = config.replace(
        instance_data_dir=str(folder), instance_prompt="x", use_aspect_ratio_buckets=True, resolution=64
    )
    batches = prepare(buckets, load_samples(folder, "x").samples).batches
    shapes = set()
    for step in range(8):
        batch = batches.batch(step, 0)
        height, width = batch.latents.shape[2:]
        assert batch.add_time_ids[0, 4:].tolist() == [4 * height, 4 * width]
        shapes.add((height, width))
        for sample, row in zip(batches.samples_at(step, 0), batch.add_time_ids, strict=True):
            assert row[:2].tolist() == [sample.height, sample.width]
            assert (sample.width > sample.height) == (width > height)
    assert len(shapes) == 3
    train(buckets.replace(max_train_steps=2))
