"""Aspect-ratio buckets: the training size of each image, all of about the same number of pixels."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets


def bucket_sizes(shapes: Sequence[tuple[int, int]], resolution: int, size_step: int) -> list[tuple[int, int]]:
    """The bucket nearest in shape to each image; all sizes are (height, width), multiples of `size_step`."""
    buckets = generate_aspect_ratio_buckets(resolution, size_step)
    return [buckets[find_nearest_bucket(height, width, buckets)] for height, width in shapes]
