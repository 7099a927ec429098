"""Aspect-ratio buckets: whole steps of the base, near the image's shape and the area asked for."""

from __future__ import annotations

from flatlora_diffusion.data.buckets import bucket_sizes


def test_a_bucket_has_the_shape_of_the_image_and_about_the_area_of_the_square() -> None:
    shapes = [(500, 500), (300, 500), (600, 400)]
    sizes = bucket_sizes(shapes, 1024, 32)
    assert sizes[0] == (1024, 1024)
    for (height, width), (tall, wide) in zip(shapes, sizes, strict=True):
        assert tall % 32 == wide % 32 == 0
        assert abs(tall / wide - height / width) / (height / width) < 0.1
        assert 0.8 < tall * wide / 1024**2 < 1.1
    assert bucket_sizes([(900, 300)], 1024, 32) == [(1440, 736)]  # none is narrower than about 1 to 2
