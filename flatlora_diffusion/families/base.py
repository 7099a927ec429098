"""`Base`: the interface of a loaded, frozen base model.

A family is a package beside this file with subclasses of `Family`, `Base` and `Objective`, and a row in `registry.py`.
No other package uses its names of models and inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatlora_diffusion.config import ObjectiveConfig
from flatlora_diffusion.families.batch import Condition
from flatlora_diffusion.families.drawing import Drawing, ImageSettings
from flatlora_diffusion.families.family import Family, checked_size
from flatlora_diffusion.families.labels import Labels
from flatlora_diffusion.families.objective import Objective


class Base(ABC):
    """A frozen base.

    Attributes:
        family: what all bases of its kind share.
        pipeline: the pipeline of diffusers.
        clip_skip: layers of the text encoders that are skipped for every prompt, if the family supports that.
    """

    family: Family
    pipeline: Any
    clip_skip: int | None

    @property
    def denoiser(self) -> Any:
        """The model that gets a LoRA."""
        return getattr(self.pipeline, self.family.denoiser)

    @property
    def text_encoders(self) -> dict[str, Any]:
        """The text encoders by their names in the pipeline."""
        return {part: getattr(self.pipeline, part) for part in self.family.text_parts}

    @property
    def vae(self) -> Any:
        """The model between pixels and latents."""
        return self.pipeline.vae

    @property
    def labels(self) -> Labels:
        """The names of the base in LoRA files."""
        return self.family.labels(self.denoiser)

    @property
    @abstractmethod
    def resolution(self) -> int:
        """The image size in pixels that the base was trained at."""

    @property
    @abstractmethod
    def size_step(self) -> int:
        """Image sides must be a multiple of this many pixels."""

    @property
    @abstractmethod
    def latent_step(self) -> int:
        """Pixels per latent pixel in each direction."""

    @property
    def predicts_v(self) -> bool:
        """Whether the model predicts velocity, which other tools may not find out from the base."""
        return False

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether the last timestep is pure noise where the family's usual bases have some signal left."""
        return False

    @property
    @abstractmethod
    def zeros_empty_prompt(self) -> bool:
        """Whether the unconditional input is zeros or the embedding of the empty prompt."""

    @property
    @abstractmethod
    def max_tokens(self) -> int:
        """The longest prompt, in tokens; text after them is ignored."""

    @abstractmethod
    def count_tokens(self, prompt: str) -> int:
        """Return the number of tokens of a prompt of any length, with those that the base adds."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Return the embeddings of prompts, as the pipeline computes them."""

    def tokenize(self, prompts: Sequence[str], mask: Tensor) -> Condition:
        """Return the inputs of `trained_model` with trained text encoders; prompts with mask (B,) 0 are dropped."""
        raise NotImplementedError(f"text encoders of {self.family.name} are not trained")

    @abstractmethod
    def geometry(
        self, original_sizes: Sequence[tuple[int, int]], crops: Sequence[tuple[int, int]], size: tuple[int, int]
    ) -> Condition:
        """Return the denoiser's inputs that depend on sizes and crops of the images, on the CPU; empty if none do.

        Args:
            original_sizes: (height, width) of the images before cropping, in pixels.
            crops: (top, left) of the crops, in pixels.
            size: (height, width) of the crops, the same for all images.
        """

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the normalized latents, (B, C, h, w) fp32, of pixels (B, 3, H, W) in [-1, 1]."""
        return self.family.posterior(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalized latents (B, C, h, w) to pixels (B, 3, H, W) fp32."""
        return self.family.decode(self.vae, latents)

    @abstractmethod
    def objective(self, config: ObjectiveConfig | None = None) -> Objective:
        """Create the objective of settings, or the unweighted one.

        Raises ConfigError for settings that are not defined for the base.
        """

    @abstractmethod
    def timesteps_at(self, shares: Tensor) -> Tensor:
        """Return the timesteps at `shares` of their range, in [0, 1), in the same shape."""

    @abstractmethod
    def trained_model(self, trains_text: bool) -> nn.Module:
        """Return the module that the loss of a training calls: the denoiser, or one with text encoders in front."""

    @abstractmethod
    def sample_latents(self, prompts: Sequence[str], seeds: Sequence[int], settings: ImageSettings) -> Tensor:
        """Generate normalized latents of one image per (prompt, seed); the noise is from a CPU generator per image."""

    @abstractmethod
    def describe_image(
        self, prompt: str, seed: int, settings: ImageSettings, base: str, loras: tuple[tuple[str, float], ...]
    ) -> Drawing | None:
        """Describe an image of `sample_latents` for other tools; None if they cannot reproduce it.

        Args:
            base: the name of the base there.
            loras: name and strength of each.
        """

    def steps_of(self, settings: ImageSettings) -> int:
        """Return the steps of an image, the family's if left open."""
        return self.family.steps if settings.steps is None else settings.steps

    def guidance_of(self, settings: ImageSettings) -> float:
        """Return the guidance of an image, the family's if left open."""
        return self.family.guidance if settings.guidance is None else settings.guidance

    def twice_differentiable(self) -> AbstractContextManager[Any]:
        """Use attention with a second derivative, which PyTorch's fused attention lacks."""
        context: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH)
        return context

    def checked_resolution(self, resolution: int | None) -> int:
        """Return `resolution`, or the base's native resolution. Raises ConfigError for an unsupported size."""
        return checked_size(resolution or self.resolution, self.size_step)

    def move(self, parts: Iterable[str], device: torch.device) -> None:
        """Move models of the pipeline, by their names in it."""
        for part in parts:
            getattr(self.pipeline, part).to(device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set eval mode, and restore each module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
