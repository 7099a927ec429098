"""Crops and flips of training images, as functions of (seed, sample, epoch)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from flatlora_diffusion.config import DataConfig, Interpolation
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.images import load_alpha, load_image, load_mask
from flatlora_diffusion.storage.rng import generator


@dataclass(frozen=True)
class View:
    """A crop of an image; sizes are (height, width), `crop_top_left` refers to the resized and mirrored image."""

    original_size: tuple[int, int]
    resized: tuple[int, int]
    is_mirrored: bool
    crop_top_left: tuple[int, int]
    size: tuple[int, int]


def choose_view(
    original_size: tuple[int, int], size: tuple[int, int], center_crop: bool, random_flip: bool, rng: torch.Generator
) -> View:
    """Choose a crop of `size` as diffusers' script does: resize the image to just cover `size`, mirror, crop.

    Both sizes are (height, width). `rng` is on the CPU.
    """
    # Always three numbers, so that one option does not change the effect of another.
    flip, down, across = torch.rand(3, generator=rng).tolist()
    (height, width), (target_height, target_width) = original_size, size
    if target_height * width >= target_width * height:
        resized = target_height, max(target_width, int(target_height * width / height))
    else:
        resized = max(target_height, int(target_width * height / width)), target_width
    spare_height, spare_width = resized[0] - target_height, resized[1] - target_width
    if center_crop:
        corner = round(spare_height / 2), round(spare_width / 2)
    else:
        corner = int(down * (spare_height + 1)), int(across * (spare_width + 1))
    return View(original_size, resized, random_flip and flip < 0.5, corner, size)


def mirrored_view(view: View, is_mirrored: bool) -> View:
    """Return the view of the same content, mirrored or not; the crop's corner is adjusted."""
    if is_mirrored == view.is_mirrored:
        return view
    top, left = view.crop_top_left
    corner = top, view.resized[1] - view.size[1] - left
    return View(view.original_size, view.resized, is_mirrored, corner, view.size)


def view_image(image: Image.Image, view: View, interpolation: Interpolation) -> Image.Image:
    """Resize, mirror and crop `image`."""
    image = image.resize(view.resized[::-1], Image.Resampling[interpolation.upper()])
    if view.is_mirrored:
        image = ImageOps.mirror(image)
    top, left = view.crop_top_left
    return image.crop((left, top, left + view.size[1], top + view.size[0]))


def image_to_tensor(image: Image.Image) -> Tensor:
    """Return pixels (3, H, W) in [-1, 1] of an RGB image, or (1, H, W) in [0, 1] of a mask (mode L)."""
    values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return values[None] if image.mode == "L" else (values * 2 - 1).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Augmentation:
    """The crops and flips of a run with these settings and this seed."""

    data: DataConfig
    seed: int

    @property
    def pixel_settings(self) -> tuple[str, str]:
        """The settings that affect the pixels of a view."""
        return self.data.image_interpolation_mode, self.data.background_color

    def epoch_view(self, sample: Sample, size: tuple[int, int], epoch: int) -> View:
        """Return the random crop and flip of a sample in `epoch`."""
        rng = generator("cpu", self.seed, "augmentation", sample.id, epoch)
        return choose_view(_original(sample), size, self.data.center_crop, self.data.random_flip, rng)

    def cached_view(self, sample: Sample, size: tuple[int, int]) -> View:
        """Return the crop, not mirrored, of a sample whose latents are cached."""
        rng = generator("cpu", self.seed, "cached_crop", sample.id)
        return choose_view(_original(sample), size, self.data.center_crop, False, rng)

    def flipped_view(self, sample: Sample, size: tuple[int, int], epoch: int) -> View:
        """Return the crop of a cached sample with the random flip of `epoch`."""
        return mirrored_view(self.cached_view(sample, size), self.epoch_view(sample, size, epoch).is_mirrored)

    def pixels(self, sample: Sample, view: View) -> Tensor:
        """Return pixels (3, H, W) in [-1, 1]. Raises ImageError if the image no longer exists."""
        image = load_image(sample.source, self.data.background_color)
        return image_to_tensor(view_image(image, view, self.data.image_interpolation_mode))

    def alpha(self, sample: Sample, view: View) -> Tensor:
        """Return the loss weight of each pixel, (1, H, W) in [0, 1]: alpha times the mask file."""
        alpha = load_alpha(sample.source)
        if sample.mask is not None:
            alpha = ImageChops.multiply(alpha, load_mask(sample.mask, alpha.size))
        return image_to_tensor(view_image(alpha, view, self.data.image_interpolation_mode))


def _original(sample: Sample) -> tuple[int, int]:
    return sample.height, sample.width
