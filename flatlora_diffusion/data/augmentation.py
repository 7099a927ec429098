"""How the images of a run are framed: each crop and flip is a function of (seed, sample, epoch)."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import ImageChops
from torch import Tensor

from flatlora_diffusion.config import DataConfig
from flatlora_diffusion.data.crops import View, choose_view, mirrored_view, pixels_of, view_image
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.data.images import load_alpha, load_image, load_mask
from flatlora_diffusion.storage.rng import generator


@dataclass(frozen=True)
class Framing:
    """The crops of a run with these settings and this seed."""

    data: DataConfig
    seed: int

    @property
    def pixel_settings(self) -> tuple[str, str]:
        """What changes the pixels of a view beside the image."""
        return self.data.image_interpolation_mode, self.data.background_color

    def drawn(self, sample: Sample, size: tuple[int, int], epoch: int) -> View:
        """Crop and flip of a sample that is loaded anew for each epoch."""
        rng = generator("cpu", self.seed, "augmentation", sample.id, epoch)
        return choose_view(_original(sample), size, self.data.center_crop, self.data.random_flip, rng)

    def kept(self, sample: Sample, size: tuple[int, int]) -> View:
        """The one crop, not mirrored, of a sample whose latents are cached."""
        rng = generator("cpu", self.seed, "cached_crop", sample.id)
        return choose_view(_original(sample), size, self.data.center_crop, False, rng)

    def flipped(self, sample: Sample, size: tuple[int, int], epoch: int) -> View:
        """The crop that a cached sample keeps, flipped anew for each epoch."""
        return mirrored_view(self.kept(sample, size), self.drawn(sample, size, epoch).is_mirrored)

    def pixels(self, sample: Sample, view: View) -> Tensor:
        """Pixels (3, H, W) in [-1, 1]. Raises ImageError when the image is not there any more."""
        image = load_image(sample.source, self.data.background_color)
        return pixels_of(view_image(image, view, self.data.image_interpolation_mode))

    def alpha(self, sample: Sample, view: View) -> Tensor:
        """How much each pixel counts, (1, H, W) in [0, 1]: its alpha, times the mask beside the image."""
        shown = load_alpha(sample.source)
        if sample.mask is not None:
            shown = ImageChops.multiply(shown, load_mask(sample.mask, shown.size))
        return pixels_of(view_image(shown, view, self.data.image_interpolation_mode))


def _original(sample: Sample) -> tuple[int, int]:
    return sample.height, sample.width
