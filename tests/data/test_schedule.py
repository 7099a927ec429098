"""The order of images, their training sizes and aspect-ratio buckets."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from PIL import Image

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.dataset import load_samples
from flatlora_diffusion.data.schedule import BucketOrder, Order, bucket_sizes
from flatlora_diffusion.training.state import prepare
from flatlora_diffusion.training.trainer import train


def shown(order: Order | BucketOrder, batches: int, first: int = 0) -> list[int]:
    return [draw.sample for index in range(first, first + batches) for draw in order.batch(index)]


def test_an_epoch_is_a_permutation_by_key() -> None:
    epochs = {}
    for seed in range(3):
        order = Order(seed, "order", count=23, repeats=1, batch_size=1)
        for epoch in range(3):
            epochs[seed, epoch] = shown(order, 23, first=23 * epoch)
            assert sorted(epochs[seed, epoch]) == list(range(23))
    assert len({tuple(epoch) for epoch in epochs.values()}) == 9


def test_the_order_stays_the_same_from_release_to_release() -> None:
    assert shown(Order(0, "order", 5, 1, 1), 5) == [4, 3, 1, 0, 2]
    assert shown(Order(1, "order", 5, 1, 1), 5, first=10) == [2, 3, 4, 0, 1]


def test_batches_continue_with_the_next_epoch() -> None:
    single, pairs = (Order(7, "order", 5, 1, size) for size in (1, 2))
    assert shown(pairs, 5) == shown(single, 10)
    assert [draw.epoch for index in range(5) for draw in pairs.batch(index)] == [0] * 5 + [1] * 5


def test_each_repeat_of_an_image_has_its_own_random_key() -> None:
    order = Order(0, "order", count=3, repeats=4, batch_size=12)
    for epoch in range(2):
        draws = order.batch(epoch)
        assert Counter(draw.sample for draw in draws) == {0: 4, 1: 4, 2: 4}
        assert len({(draw.sample, draw.epoch) for draw in draws}) == 12
    assert not set(order.batch(0)) & set(order.batch(1))


def test_every_batch_has_a_single_bucket_and_every_epoch_every_sample() -> None:
    buckets = [0] * 7 + [1] * 3 + [2]
    order = BucketOrder(0, "order", buckets, repeats=1, batch_size=4)
    assert order.batches_per_epoch == 2 + 1 + 1
    rows = []
    for epoch in range(3):
        batches = [order.batch(index) for index in range(4 * epoch, 4 * epoch + 4)]
        assert all(len({buckets[draw.sample] for draw in batch}) == 1 for batch in batches)
        assert {draw.sample for batch in batches for draw in batch} == set(range(11))
        draws = [draw for batch in batches for draw in batch]
        assert len(set(draws)) == len(draws), "one view of a sample was shown twice"
        rows.append(draws)
    assert not set(rows[0]) & set(rows[1])
    orders = {tuple(buckets[order.batch(index)[0].sample] for index in range(4 * e, 4 * e + 4)) for e in range(12)}
    assert len(orders) > 3, "the batches are not shuffled"


def test_the_order_does_not_use_the_global_generator() -> None:
    before = torch.get_rng_state()
    BucketOrder(0, "order", [0, 1, 1], 2, 2).batch(5)
    Order(0, "order", 3, 2, 2).batch(5)
    assert torch.equal(torch.get_rng_state(), before)


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
        assert batch.geometry["add_time_ids"][0, 4:].tolist() == [4 * height, 4 * width]
        shapes.add((height, width))
        for sample, row in zip(batches.samples_at(step, 0), batch.geometry["add_time_ids"], strict=True):
            assert row[:2].tolist() == [sample.height, sample.width]
            assert (sample.width > sample.height) == (width > height)
    assert len(shapes) == 3
    train(buckets.replace(max_train_steps=2))
