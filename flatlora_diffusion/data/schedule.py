"""Which image is shown when and at which size, and how many steps that makes: pure functions of the settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatlora_diffusion.config import TrainConfig
from flatlora_diffusion.data.buckets import bucket_sizes
from flatlora_diffusion.data.epochs import steps_per_epoch, total_steps
from flatlora_diffusion.data.order import BucketOrder, Order


@dataclass(frozen=True)
class Schedule:
    """The training size (height, width) of each image, the order of images and class images, and the steps."""

    sizes: list[tuple[int, int]]
    order: Order | BucketOrder
    class_order: Order
    slots: int  # micro-batches of one optimizer step, of all processes
    steps_per_epoch: int
    total_steps: int


def schedule_of(
    config: TrainConfig, shapes: Sequence[tuple[int, int]], size_step: int, processes: int = 1, class_images: int = 0
) -> Schedule:
    """The schedule of images of these (height, width). `config` has its seed and resolution."""
    seed, resolution, batch_size = config.run.seed, config.data.resolution, config.optim.train_batch_size
    assert seed is not None
    assert resolution is not None
    order: Order | BucketOrder
    if config.data.use_aspect_ratio_buckets:
        sizes = bucket_sizes(shapes, resolution, size_step)
        known = sorted(set(sizes))
        order = BucketOrder(seed, "order", [known.index(size) for size in sizes], config.data.repeats, batch_size)
    else:
        sizes = [(resolution, resolution)] * len(shapes)
        order = Order(seed, "order", len(shapes), config.data.repeats, batch_size)
    return Schedule(
        sizes=sizes,
        order=order,
        class_order=Order(seed, "class_order", class_images, 1, batch_size),
        slots=config.optim.gradient_accumulation_steps * processes,
        steps_per_epoch=steps_per_epoch(config, order.samples_per_epoch, processes),
        total_steps=total_steps(config, order.samples_per_epoch, processes),
    )
