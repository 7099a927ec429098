"""Classification of icons by name and style with a small CLIP (`samples/tiny_sdxl/judge`); inference only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

# The judge was trained on these texts; others score lower.
NAME_PROMPT = "an icon of {}"
STYLE_PROMPTS = {
    "noto": "noto style",
    "twemoji": "twemoji style",
    "fluent-flat": "flat fluent style",
    "fluent-3d": "3d style",
}
_CHUNK = 256  # images or texts per forward

Images = Sequence[Image.Image] | Tensor


@dataclass(frozen=True)
class Judge:
    """An image-text retrieval model and the tokenizer it was trained with."""

    model: CLIPModel
    tokenizer: CLIPTokenizer


def load_judge(folder: Path) -> Judge:
    """Load the judge from `folder`, in float32 and eval mode on the CPU."""
    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    return Judge(model.eval(), CLIPTokenizer.from_pretrained(folder))


def rank_names(judge: Judge, images: Images, names: Sequence[str]) -> Tensor:
    """Return the probability of each name for each image, (B, len(names)) on the CPU; rows sum to 1."""
    return _probabilities(judge, images, [NAME_PROMPT.format(name) for name in names])


def style_probabilities(judge: Judge, images: Images) -> Tensor:
    """Return the probability of each of `STYLE_PROMPTS` for each image, (B, 4) on the CPU; rows sum to 1."""
    return _probabilities(judge, images, list(STYLE_PROMPTS.values()))


def rank_of(scores: Tensor, right: Tensor) -> Tensor:
    """Return how many other columns of row b score at least as high as column `right[b]`; 0 is the best.

    Shapes (B, N), (B,) -> (B,). Ties count as errors, so that constant scores are never right.
    """
    return (scores >= scores.gather(1, right[:, None])).sum(dim=1) - 1


@torch.inference_mode()
def embed_images(judge: Judge, images: Images) -> Tensor:
    """Return unit vectors of the images, (B, D) on the judge's device."""
    pixels = pixel_values(images, int(judge.model.config.vision_config.image_size)).to(judge.model.device)
    return torch.cat([image_vectors(judge.model, chunk) for chunk in pixels.split(_CHUNK)])


@torch.inference_mode()
def embed_texts(judge: Judge, texts: Sequence[str]) -> Tensor:
    """Return unit vectors of the texts, (T, D) on the judge's device, truncated to the tokenizer's length."""
    ids = judge.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")["input_ids"]
    return torch.cat([text_vectors(judge.model, chunk) for chunk in ids.to(judge.model.device).split(_CHUNK)])


def pixel_values(images: Images, size: int) -> Tensor:
    """Return the vision tower's input, (B, 3, size, size) in [-1, 1], as the saved CLIPImageProcessor does.

    Args:
        images: square RGB images, or a tensor (B, 3, H, H) in [0, 1].

    Raises:
        ValueError: an image is not square or not RGB.
    """
    rows = (
        list(images.detach().cpu().float()) if isinstance(images, Tensor) else [_to_tensor(image) for image in images]
    )
    for row in rows:
        if row.shape[-2] != row.shape[-1]:
            raise ValueError(f"an image of {row.shape[-1]} x {row.shape[-2]} is not square: crop or pad it first")
    return torch.stack([row if row.shape[-1] == size else _resized(row, size) for row in rows]) * 2 - 1


def image_vectors(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Return unit vectors of preprocessed images, (B, 3, S, S) -> (B, D), float32 also under autocast."""
    return F.normalize(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output).float(), dim=-1)


def text_vectors(model: CLIPModel, input_ids: Tensor) -> Tensor:
    """Return unit vectors of token rows, (T, L) -> (T, D); padding after the end token has no effect."""
    return F.normalize(model.text_projection(model.text_model(input_ids=input_ids).pooler_output).float(), dim=-1)


def _probabilities(judge: Judge, images: Images, texts: list[str]) -> Tensor:
    similarity = embed_images(judge, images) @ embed_texts(judge, texts).T
    return (judge.model.logit_scale.detach().exp() * similarity).softmax(dim=-1).cpu()


def _to_tensor(image: Image.Image) -> Tensor:
    if image.mode != "RGB":
        raise ValueError(f"image mode {image.mode} is not RGB: composite the image on a background first")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _resized(pixels: Tensor, size: int) -> Tensor:
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
