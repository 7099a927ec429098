"""Which image is shown when and at which size, and how many steps that makes: pure functions of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.buckets import bucket_sizes
from flatlora_diffusion.data.epochs import steps_per_epoch, total_steps
from flatlora_diffusion.data.sampling_order import BucketOrder, Order, Pick


class Shape(Protocol):
    """What the schedule must know of an image: its size, and how much more often than others it is shown."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def repeats(self) -> int: ...


@dataclass(frozen=True)
class Schedule:
    """The training size (height, width) of each image, the order of images and class images, and the steps.

    `order` is that of the `shown`: (image, which of its repeats).
    """

    sizes: list[tuple[int, int]]
    shown: list[tuple[int, int]]
    order: Order | BucketOrder
    class_order: Order
    slots: int  # micro-batches of one optimizer step, of all processes
    steps_per_epoch: int
    total_steps: int

    def batch(self, index: int) -> list[Pick]:
        """The images of the batch at `index`; each repeat of an image has epochs, and so crops, of its own."""
        most = 1 + max(repeat for _, repeat in self.shown)
        drawn = [(*self.shown[draw.sample], draw.epoch) for draw in self.order.batch(index)]
        return [Pick(image, epoch * most + repeat) for image, repeat, epoch in drawn]


def schedule_of(
    config: TrainConfig, images: Sequence[Shape], size_step: int, processes: int = 1, class_images: int = 0
) -> Schedule:
    """The schedule of these images. `config` has its seed and resolution."""
    seed, resolution, batch_size = config.run.seed, config.data.resolution, config.optim.train_batch_size
    assert seed is not None
    assert resolution is not None
    order: Order | BucketOrder
    shapes = [(image.height, image.width) for image in images]
    shown = [(place, repeat) for place, image in enumerate(images) for repeat in range(image.repeats)]
    if config.data.use_aspect_ratio_buckets:
        sizes = bucket_sizes(shapes, resolution, size_step)
        known = sorted(set(sizes))
        buckets = [known.index(sizes[image]) for image, _ in shown]
        order = BucketOrder(seed, "order", buckets, config.data.repeats, batch_size)
    else:
        sizes = [(resolution, resolution)] * len(shapes)
        order = Order(seed, "order", len(shown), config.data.repeats, batch_size)
    return Schedule(
        sizes=sizes,
        shown=shown,
        order=order,
        class_order=Order(seed, "class_order", class_images, 1, batch_size),
        slots=config.optim.gradient_accumulation_steps * processes,
        steps_per_epoch=steps_per_epoch(config, order.samples_per_epoch, processes),
        total_steps=total_steps(config, order.samples_per_epoch, processes),
    )
