"""A saved vision model's preprocessing: resize, centre crop, mean and deviation; needs no torchvision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ImageProcessingMixin

from flatlora_diffusion.config import ConfigError


@dataclass(frozen=True)
class VisionInput:
    """A model's saved preprocessing, in the order in which it is done: resize, centre crop, scale, normalize.

    `shortest_edge` keeps the shape of an image, `resize` (height, width) does not; one of them or neither is set.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: Image.Resampling
    shortest_edge: int | None = None
    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    scale: float = 1 / 255

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """The images as the model reads them, (B, 3, H, W). Raises ValueError if their shapes then differ."""
        rows = [self._row(image.convert("RGB")) for image in images]
        if len({row.shape for row in rows}) > 1:
            raise ValueError("images of different shapes, and this model's preprocessing does not crop them to one")
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (torch.stack(rows) * self.scale - mean) / std

    def _row(self, image: Image.Image) -> Tensor:
        if self.resize is not None:
            image = image.resize(self.resize[::-1], self.resample)
        if self.shortest_edge is not None:
            short = min(image.size)
            width, height = (int(self.shortest_edge * side / short) for side in image.size)
            image = image.resize((width, height), self.resample)
        if self.crop is not None:
            height, width = self.crop
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # beyond the edge it is black, as there
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def load_vision_input(name_or_path: str) -> VisionInput:
    """The preprocessing saved with a model in a folder or on the hub.

    Raises ConfigError when there is none or when it has a step that is not known here.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name_or_path} has no preprocessor_config.json that can be read: {str(error).splitlines()[0]}; "
            "save the model's image processor beside it"
        ) from error
    return vision_input(settings, name_or_path)


def vision_input(settings: Mapping[str, Any], source: str) -> VisionInput:
    """The preprocessing that the settings of an image processor of CLIP, DINOv2 or BLIP describe.

    `source` names them in messages. Raises ConfigError for settings that are not known here.
    """
    try:
        size = _sizes(settings["size"], "shortest_edge") if settings.get("do_resize", True) else {}
        crop = settings.get("crop_size")
        is_cropped = crop is not None and settings.get("do_center_crop", True)
        crop = _sizes(crop, "square") if is_cropped else {}
        if set(size) - {"shortest_edge"} and set(size) != {"height", "width"}:
            raise ValueError(f"size={settings['size']}")
        is_normalized = settings.get("do_normalize", True)
        return VisionInput(
            mean=tuple(settings["image_mean"]) if is_normalized else (0.0,) * 3,
            std=tuple(settings["image_std"]) if is_normalized else (1.0,) * 3,
            resample=Image.Resampling(settings.get("resample", Image.Resampling.BICUBIC)),
            shortest_edge=size.get("shortest_edge"),
            resize=(size["height"], size["width"]) if "height" in size else None,
            crop=(crop["height"], crop["width"]) if crop else None,
            scale=settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the preprocessor_config.json of {source} is of a kind that is not read here ({error}); "
            "use a model with that of CLIP, DINOv2 or BLIP"
        ) from error


def _sizes(value: Any, of_number: str) -> dict[str, int]:
    """Sizes by name; older files have a bare number."""
    if isinstance(value, int):
        return {"shortest_edge": value} if of_number == "shortest_edge" else {"height": value, "width": value}
    return {name: int(side) for name, side in dict(value).items() if side is not None}
