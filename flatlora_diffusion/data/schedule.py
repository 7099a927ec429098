"""The order of images in a run, their training sizes and the number of steps: pure functions of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.epochs import steps_per_epoch, total_steps
from flatlora_diffusion.storage.rng import generator


@dataclass(frozen=True)
class ScheduledSample:
    """An image of a batch: the sample's index, and the epoch (or repeat) that seeds its crop and flip."""

    sample: int
    epoch: int


class Order:
    """An endless order of `count` samples; each appears `repeats` times per epoch, reshuffled every epoch."""

    def __init__(self, seed: int, purpose: str, count: int, repeats: int, batch_size: int) -> None:
        self.key = (seed, purpose)
        self.count, self.repeats, self.batch_size = count, repeats, batch_size

    @property
    def samples_per_epoch(self) -> int:
        return self.count * self.repeats

    def batch(self, index: int) -> list[ScheduledSample]:
        """Return the batch at `index` of all epochs in a row."""
        first = index * self.batch_size
        return [self._at(position) for position in range(first, first + self.batch_size)]

    def _at(self, index: int) -> ScheduledSample:
        epoch, position = divmod(index, self.samples_per_epoch)
        repeat, sample = divmod(_permutation(*self.key, epoch, self.samples_per_epoch)[position], self.count)
        return ScheduledSample(sample, epoch * self.repeats + repeat)


class BucketOrder:
    """An endless order in which each batch is from one bucket; `buckets[i]` is the bucket of sample i.

    Each sample appears at least `repeats` times per epoch: the last batch of a bucket is filled up with its samples.
    """

    def __init__(self, seed: int, purpose: str, buckets: Sequence[int], repeats: int, batch_size: int) -> None:
        self.key = (seed, purpose)
        self.repeats, self.batch_size = repeats, batch_size
        self.members: dict[int, list[int]] = {}
        for sample, bucket in enumerate(buckets):
            self.members.setdefault(bucket, []).append(sample)
        self.batches_per_epoch = sum(self._batches(len(members)) for members in self.members.values())

    @property
    def samples_per_epoch(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def batch(self, index: int) -> list[ScheduledSample]:
        """Return the batch at `index` of all epochs in a row."""
        epoch, position = divmod(index, self.batches_per_epoch)
        bucket, number = self._bucket_of(_permutation(*self.key, epoch, self.batches_per_epoch)[position])
        members = self.members[bucket]
        order = _permutation(self.key[0], f"{self.key[1]}/{bucket}", epoch, len(members) * self.repeats)
        positions = range(number * self.batch_size, (number + 1) * self.batch_size)
        entries = [(order[position % len(order)], position // len(order)) for position in positions]
        span = self.repeats * (self.batch_size + 1)  # an upper bound of a sample's appearances in an epoch
        return [
            ScheduledSample(members[entry % len(members)], epoch * span + lap * self.repeats + entry // len(members))
            for entry, lap in entries
        ]

    def _bucket_of(self, batch: int) -> tuple[int, int]:
        """Return the bucket of batch number `batch` before shuffling, and its number within the bucket."""
        for bucket, members in self.members.items():
            if batch < self._batches(len(members)):
                return bucket, batch
            batch -= self._batches(len(members))
        raise IndexError(batch)

    def _batches(self, members: int) -> int:
        return -(-members * self.repeats // self.batch_size)


class Shape(Protocol):
    """An image's size and its repeats per epoch."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def repeats(self) -> int: ...


@dataclass(frozen=True)
class Schedule:
    """The training size (height, width) of each image, the order of images and class images, and the steps.

    `order` refers to `repeated_samples`, a list of (image, number of its repeat).
    """

    sizes: list[tuple[int, int]]
    repeated_samples: list[tuple[int, int]]
    order: Order | BucketOrder
    class_order: Order
    slots: int  # micro-batches per optimizer step, over all processes
    steps_per_epoch: int
    total_steps: int

    def batch(self, index: int) -> list[ScheduledSample]:
        """Return the images of the batch at `index`; each repeat of an image has its own epochs and crops."""
        repeats = 1 + max(repeat for _, repeat in self.repeated_samples)
        draws = [(*self.repeated_samples[draw.sample], draw.epoch) for draw in self.order.batch(index)]
        return [ScheduledSample(image, epoch * repeats + repeat) for image, repeat, epoch in draws]


def build_schedule(
    config: TrainConfig, images: Sequence[Shape], size_step: int, processes: int = 1, class_images: int = 0
) -> Schedule:
    """Schedule these images; `config` must have its seed and resolution."""
    seed, resolution, batch_size = config.run.seed, config.data.resolution, config.optim.train_batch_size
    assert seed is not None
    assert resolution is not None
    order: Order | BucketOrder
    shapes = [(image.height, image.width) for image in images]
    repeated_samples = [(index, repeat) for index, image in enumerate(images) for repeat in range(image.repeats)]
    if config.data.use_aspect_ratio_buckets:
        sizes = bucket_sizes(shapes, resolution, size_step)
        distinct = sorted(set(sizes))
        buckets = [distinct.index(sizes[image]) for image, _ in repeated_samples]
        order = BucketOrder(seed, "order", buckets, config.data.repeats, batch_size)
    else:
        sizes = [(resolution, resolution)] * len(shapes)
        order = Order(seed, "order", len(repeated_samples), config.data.repeats, batch_size)
    return Schedule(
        sizes=sizes,
        repeated_samples=repeated_samples,
        order=order,
        class_order=Order(seed, "class_order", class_images, 1, batch_size),
        slots=config.optim.gradient_accumulation_steps * processes,
        steps_per_epoch=steps_per_epoch(config, order.samples_per_epoch, processes),
        total_steps=total_steps(config, order.samples_per_epoch, processes),
    )


def bucket_sizes(shapes: Sequence[tuple[int, int]], resolution: int, size_step: int) -> list[tuple[int, int]]:
    """Return the aspect-ratio bucket nearest in shape to each image; sizes are (height, width).

    All buckets have about the same number of pixels and sides that are multiples of `size_step`.
    """
    buckets = generate_aspect_ratio_buckets(resolution, size_step)
    return [buckets[find_nearest_bucket(height, width, buckets)] for height, width in shapes]


@lru_cache(maxsize=64)
def _permutation(seed: int, purpose: str, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator("cpu", seed, purpose, epoch)).tolist()
