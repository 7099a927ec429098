"""`Family`: what is known of a kind of base before it is loaded. Importing it takes no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from flatlora_diffusion.config import ConfigError, ModelConfig, TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from flatlora_diffusion.families.labels import Labels


class Sizes(NamedTuple):
    """A base's native image size in pixels, and the step that image sides must be a multiple of."""

    native: int
    step: int


class Family(ABC):
    """The bases of one pipeline class.

    Attributes:
        name: its name in messages.
        pipeline: the class of the pipeline in diffusers, by which `registry.FAMILIES` finds the family.
        usual_base: the hub id of the base whose sizes stand for a base that is not on disk.
        denoiser: the part of the pipeline that gets a LoRA, which is also its prefix in LoRA files.
        denoiser_title: its name in messages.
        text_parts: the text encoders of the pipeline.
        trains_text: whether LoRAs of the text encoders and new tokens are supported.
        unsupported: settings without a meaning for the family, with the value that turns them off.
        steps, guidance: defaults of an image.
        prefers_bf16: whether fp16 may overflow where bf16 does not.
        loader: `module:function` that loads a base, as `registry.load_base`.
        hub_name: lower-case text in hub ids of its bases, by which one not on disk is recognized; None for SDXL.
        single_file_saver: `module:function` that saves a pipeline as a single file; None if that is not supported.
        random_loader: `module:function` that creates a base with random weights, as `registry.random_base`.
    """

    name: str
    pipeline: str
    usual_base: str
    denoiser: str
    denoiser_title: str
    text_parts: tuple[str, ...]
    trains_text: bool
    unsupported: Mapping[str, object]
    steps: int
    guidance: float
    prefers_bf16: bool
    loader: str
    random_loader: str
    hub_name: str | None = None
    single_file_saver: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The models of the pipeline."""
        return self.denoiser, *self.text_parts, "vae"

    @property
    def lora_parts(self) -> tuple[str, ...]:
        """The models that a LoRA file can change."""
        return self.denoiser, *(self.text_parts if self.trains_text else ())

    @abstractmethod
    def check_source(self, config: ModelConfig) -> None:
        """Raise ConfigError for an invalid base or VAE, by paths and file headers only."""

    @abstractmethod
    def on_meta(self, config: ModelConfig, part: str) -> Any:
        """Create a part of the pipeline on the meta device: fp32, frozen, in eval mode."""

    @abstractmethod
    def labels(self, denoiser: Any) -> Labels:
        """Return the names of the base in LoRA files."""

    @abstractmethod
    def sizes(self, config: ModelConfig) -> Sizes:
        """Return the sizes of the base by its config files; of the family's usual base if these are not on disk."""

    @abstractmethod
    def known_sizes(self, config: ModelConfig) -> Sizes | None:
        """Return the sizes in the config files on disk; None if these are missing or invalid."""

    @property
    @abstractmethod
    def file_prefixes(self) -> Mapping[str, str]:
        """The beginnings of the tensors' names in a single file, by part."""

    @abstractmethod
    def file_names(self, part: str, module: str, denoiser: Any) -> dict[str, str]:
        """Return the style (`lora_files.names.Style`) of each name that LoRA files have for a layer.

        Args:
            part: the part of the pipeline.
            module: the layer's path in it.
            denoiser: the base's denoiser, possibly on the meta device.
        """

    def split_name(self, name: str) -> tuple[str, ...]:
        """Return the names of the layers that share the rows of a layer of a file; only `name` for most layers."""
        return (name,)

    @abstractmethod
    def posterior(self, vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and std of the normalized latents, (B, C, h, w) fp32, of pixels (B, 3, H, W) in [-1, 1].

        The std is 0 in a family that trains on the mean; it may be (B, 1, 1, 1).
        """

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Decode normalized latents (B, C, h, w) to pixels (B, 3, H, W) fp32."""

    @abstractmethod
    def vae_dtype(self, config: ModelConfig, dtype: torch.dtype) -> torch.dtype:
        """Return the precision of the VAE with a base in `dtype`."""

    @abstractmethod
    def latent_shape(self, config: ModelConfig, resolution: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latents of an image of `resolution` pixels."""

    @abstractmethod
    def prompt_numbers(self, config: ModelConfig) -> int:
        """Return the count of numbers in what `Base.encode_prompts` returns for a prompt."""

    @abstractmethod
    def step_model(self, denoiser: Any, text_encoders: Mapping[str, Any], clip_skip: int | None) -> nn.Module:
        """Return a module that computes `denoiser` from the tensors of `step_inputs`, to measure its memory.

        Args:
            text_encoders: trained text encoders by part; empty if none is trained.
        """

    @abstractmethod
    def step_inputs(
        self, config: ModelConfig, images: int, resolution: int, dtype: torch.dtype, trains_text: bool
    ) -> tuple[Tensor, ...]:
        """Return the inputs of a step on the meta device, the noisy latents first."""

    def call_options(self, config: ModelConfig) -> dict[str, int]:
        """Return the arguments of the pipeline's call without which a base of unusual sizes draws another image."""
        return {}

    def check_settings(self, config: TrainConfig) -> None:
        """Raise ConfigError for settings that the family does not support, and for an unsupported size of images."""
        if config.trains_text and not self.trains_text:
            name = "train_text_encoder" if config.adapter.train_text_encoder else "train_text_encoder_ti"
            raise ConfigError(f"--{name} is not supported on {self.name}; leave it out")
        self.check_sections(*vars(config).values())
        self.check_resolution(config.model, config.data.resolution)

    def check_sections(self, *sections: object) -> None:
        """Raise ConfigError for a setting of these sections that is in `unsupported`."""
        for section in sections:
            for name, off in self.unsupported.items():
                value = getattr(section, name, off)
                if value != off:
                    raise ConfigError(f"{name}={value!r} does not fit {self.name}; leave out --{name}")

    def check_resolution(self, config: ModelConfig, resolution: int | None) -> None:
        """Raise ConfigError as `checked_size` does, if the base's sizes are known before it is loaded."""
        sizes = self.known_sizes(config)
        if resolution is not None and sizes is not None:
            checked_size(resolution, sizes.step)


def checked_size(resolution: int, step: int) -> int:
    """Return `resolution`. Raises ConfigError if it is not a multiple of the base's `step`."""
    if resolution % step:
        nearest = max(1, round(resolution / step)) * step
        raise ConfigError(
            f"resolution={resolution} must be a multiple of {step} for this base; {nearest} is the nearest"
        )
    return resolution
