"""How an image becomes a training picture: resized, mirrored, cropped, and told to SDXL in its size conditioning."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from flatlora_diffusion.config import Interpolation


@dataclass(frozen=True)
class View:
    """One crop of one image; sizes are (height, width), `crop_top_left` is in the resized (and mirrored) image."""

    original_size: tuple[int, int]
    resized: tuple[int, int]
    is_mirrored: bool
    crop_top_left: tuple[int, int]
    size: tuple[int, int]


def choose_view(
    original_size: tuple[int, int], size: tuple[int, int], center_crop: bool, random_flip: bool, rng: torch.Generator
) -> View:
    """The crop of `size` that covers an image of `original_size` with the least loss, as in diffusers' script.

    The image is resized until it just covers `size`, mirrored, then cropped. `rng` (CPU) gives three numbers whatever
    the options, so that switching one on does not change the other.
    """
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
    """The same picture content mirrored or not: the crop's corner moves along."""
    if is_mirrored == view.is_mirrored:
        return view
    top, left = view.crop_top_left
    corner = top, view.resized[1] - view.size[1] - left
    return View(view.original_size, view.resized, is_mirrored, corner, view.size)


def view_image(image: Image.Image, view: View, interpolation: Interpolation) -> Image.Image:
    """The picture that `view` shows of `image`."""
    image = image.resize(view.resized[::-1], Image.Resampling[interpolation.upper()])
    if view.is_mirrored:
        image = ImageOps.mirror(image)
    top, left = view.crop_top_left
    return image.crop((left, top, left + view.size[1], top + view.size[0]))


def pixels_of(image: Image.Image) -> Tensor:
    """Pixels (3, H, W) in [-1, 1] of an RGB image, (1, H, W) in [0, 1] of a mask (mode L)."""
    values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255
    return values[None] if image.mode == "L" else (values * 2 - 1).permute(2, 0, 1).contiguous()
