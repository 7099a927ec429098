"""Encoders of images and texts to unit vectors, whose cosines are the metrics; inference only.

There are three kinds: the judge that ships with this program, CLIP and DINOv2. Only safetensors files are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, Dinov2Model

from flatlora_diffusion.config import SAMPLES, ConfigError
from flatlora_diffusion.evaluation.judge import (
    Judge,
    embed_images,
    embed_texts,
    image_vectors,
    load_judge,
    text_vectors,
)
from flatlora_diffusion.storage.hub_errors import loading_failure

JUDGE = "judge"
_CHUNK = 32  # images or texts per forward
_LOAD_ERRORS = (OSError, ValueError, SafetensorError)


@dataclass(frozen=True)
class Encoder:
    """A model that encodes images and, if `texts` is not None, texts to float32 unit vectors on the CPU.

    `name` is its hub id or path.
    """

    name: str
    images: Callable[[Sequence[Image.Image]], Tensor]
    texts: Callable[[Sequence[str]], Tensor] | None

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors (B, D) of RGB images of any size, after the model's preprocessing."""
        return self._in_chunks(self.images, images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors (T, D) of texts, truncated to the model's length.

        Raises ConfigError for a model without text encoder.
        """
        if self.texts is None:
            raise ConfigError(f"{self.name} encodes images only; give a CLIP model to compare images with prompts")
        return self._in_chunks(self.texts, texts)

    def _in_chunks(self, encode: Callable[[Any], Tensor], values: Sequence[Any]) -> Tensor:
        if not values:
            raise ValueError("nothing to encode")
        with torch.inference_mode():
            parts = [encode(values[start : start + _CHUNK]).float().cpu() for start in range(0, len(values), _CHUNK)]
        return torch.cat(parts).clone()  # a clone outside inference mode is a normal tensor


def load_encoder(name_or_path: str) -> Encoder:
    """Load `judge`, or a CLIP or DINOv2 from a folder or the hub, in float32 on the CPU.

    Raises ConfigError if there is no such model.
    """
    if name_or_path == JUDGE:
        return judge_encoder(load_judge(SAMPLES / "tiny_sdxl" / "judge"))
    try:
        kind = AutoConfig.from_pretrained(name_or_path).model_type
    except _LOAD_ERRORS as error:
        raise ConfigError(_load_message(name_or_path, error)) from error
    if kind == "clip":
        return _clip_encoder(name_or_path)
    if kind == "dinov2":
        return _dino_encoder(name_or_path)
    raise ConfigError(f"encoder {name_or_path!r} is a {kind} model; give {JUDGE!r}, a CLIP or a DINOv2")


def judge_encoder(judge: Judge) -> Encoder:
    """Wrap the judge as an encoder; it was trained on texts such as `an icon of a fox`, not on full prompts."""
    return Encoder(
        JUDGE,
        lambda images: embed_images(judge, [centre_square(image) for image in images]),
        lambda texts: embed_texts(judge, texts),
    )


def centre_square(image: Image.Image) -> Image.Image:
    """Crop the largest centred square."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def load_image_reader(name_or_path: str) -> Callable[[Sequence[Image.Image]], Tensor]:
    """Load a model's image preprocessing, a function from images to pixels (B, 3, H, W).

    Raises ConfigError if there is none.
    """
    try:
        processor = AutoImageProcessor.from_pretrained(name_or_path, backend="pil")  # needs no torchvision
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{name_or_path} has no readable preprocessor_config.json: {loading_failure(name_or_path, error)}; save "
            "the model's image processor beside it"
        ) from error
    return lambda images: processor([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]


def _clip_encoder(name_or_path: str) -> Encoder:
    model = _load(CLIPModel, name_or_path)
    to_pixels = load_image_reader(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except _LOAD_ERRORS as error:
        raise ConfigError(_load_message(name_or_path, error)) from error
    longest = int(model.config.text_config.max_position_embeddings)

    def texts(values: Sequence[str]) -> Tensor:
        ids = tokenizer(list(values), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        return text_vectors(model, ids["input_ids"])

    return Encoder(name_or_path, lambda images: image_vectors(model, to_pixels(images)), texts)


def _dino_encoder(name_or_path: str) -> Encoder:
    model = _load(Dinov2Model, name_or_path)
    to_pixels = load_image_reader(name_or_path)

    def images(values: Sequence[Image.Image]) -> Tensor:
        """Return the CLS token after the last layer norm."""
        return F.normalize(model(to_pixels(values)).last_hidden_state[:, 0], dim=-1)

    return Encoder(name_or_path, images, None)


def load_weights(model_class: Any, name_or_path: str, role: str) -> Any:
    """Load a model of transformers in float32 and eval mode.

    Raises ConfigError, with the model's `role` in the message, if weights are missing; otherwise as transformers does.
    """
    model, info = model_class.from_pretrained(
        name_or_path, dtype=torch.float32, use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ConfigError(f"{role} {name_or_path!r} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.eval()


def _load(model_class: Any, name_or_path: str) -> Any:
    try:
        return load_weights(model_class, name_or_path, "encoder")
    except ConfigError:
        raise
    except _LOAD_ERRORS as error:
        raise ConfigError(_load_message(name_or_path, error)) from error


def _load_message(name_or_path: str, error: Exception) -> str:
    reason = loading_failure(name_or_path, error)
    return f"encoder {name_or_path!r} cannot be loaded: {reason}; {JUDGE!r} is always available"
