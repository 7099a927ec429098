"""A second judge of names, so that no figure rests on one network: a small ResNet that tells all concepts apart.

It differs from the first in architecture, objective, seed and augmentation, and has seen the drawings of MORE_STYLES
too; the renders that are held out are the same. Only the recipe's report uses it, and it is not shipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import update_bn
from transformers import ResNetConfig, ResNetForImageClassification

from flatlora_diffusion.evaluation.judge import Images, pixel_values
from flatlora_diffusion.storage.rng import generator
from samples.tiny_sdxl.recipe.icons import SIZE, Concept, render
from samples.tiny_sdxl.recipe.judge import Renders, can_mirror, split_held_out
from samples.tiny_sdxl.recipe.loop import Schedule, train
from samples.tiny_sdxl.recipe.quality import Ranker
from samples.tiny_sdxl.recipe.vae import to_pixels

SCHEDULE = Schedule(steps=3000, learning_rate=2e-3, weight_decay=0.05, ema=0.995)
SEED = 1
BATCH = 64
SETTLING = 60  # batches over which batch normalization averages, with the final weights
NO_STYLE = -1  # of the drawings of MORE_STYLES, which the first judge does not know


def build_second_judge(concepts: Sequence[Concept]) -> ResNetForImageClassification:
    """A randomly initialized ResNet-18 of half the usual width, about 3.6 M parameters; call under a fixed seed."""
    codes = dict(enumerate(concept.hexcode for concept in concepts))
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 192, 320],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        id2label=codes,
        label2id={code: index for index, code in codes.items()},
    )
    return ResNetForImageClassification(config)


def train_second_judge(concepts: Sequence[Concept], renders: Renders, work: Path, folder: Path) -> None:
    """Train on the first judge's renders without its held-out ones, and on those of MORE_STYLES; save to `folder`."""
    torch.manual_seed(SEED)
    model = build_second_judge(concepts).train().to(memory_format=torch.channels_last)
    data = _with_more_styles(renders.take(split_held_out(renders)[0]), concepts)
    may_mirror = torch.tensor([can_mirror(concept) for concept in concepts])

    def batch_at(step: int) -> tuple[Tensor, Tensor]:
        rng = generator("cpu", SEED, "second judge", step)
        batch = data.take(torch.randint(0, len(data.concepts), (BATCH,), generator=rng))
        pixels = augment(to_pixels(batch.images), may_mirror[batch.concepts], rng)
        return pixels.contiguous(memory_format=torch.channels_last), batch.concepts

    def loss_at(step: int) -> Tensor:
        pixels, owners = batch_at(step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels).logits
        return F.cross_entropy(logits.float(), owners, label_smoothing=0.1)

    def settling() -> Iterator[Tensor]:
        return (batch_at(SCHEDULE.steps + step)[0] for step in range(SETTLING))

    train(model, loss_at, SCHEDULE, work / "judge2.safetensors")
    update_bn(settling(), model)  # the loop averages weights only
    model.to(memory_format=torch.contiguous_format).save_pretrained(folder)


def load_second_judge(folder: Path) -> Ranker:
    """The saved judge, as the report uses it."""
    model = ResNetForImageClassification.from_pretrained(folder).eval()

    @torch.inference_mode()
    def rank(images: Images, concepts: Sequence[Concept]) -> Tensor:
        logits = torch.cat([model(chunk).logits for chunk in pixel_values(images, SIZE).split(256)])
        return logits[:, [model.config.label2id[concept.hexcode] for concept in concepts]]

    return rank


def augment(pixels: Tensor, may_mirror: Tensor, rng: torch.Generator) -> Tensor:
    """Crops and shears, another mix of the colours, fewer pixels, and a patch of one colour over a part.

    (B, 3, H, W) in [-1, 1], and (B,) which rows may be mirrored.
    """
    batch, _, height, width = pixels.shape

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=rng)

    mirror = torch.where(may_mirror & (uniform(0, 1) < 0.5), -1.0, 1.0)
    zoom = uniform(0.8, 1.15, 2)
    shear, shift = uniform(-0.12, 0.12, 2), uniform(-0.12, 0.12, 2)
    rows = torch.stack([mirror * zoom[:, 0], shear[:, 0], shift[:, 0], shear[:, 1], zoom[:, 1], shift[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    mixed = torch.einsum("bij,bjhw->bihw", torch.eye(3) + 0.12 * torch.randn(batch, 3, 3, generator=rng), moved)
    coarse = F.interpolate(mixed, scale_factor=0.5, mode="area")
    soft = torch.lerp(
        mixed, F.interpolate(coarse, (height, width), mode="bilinear"), uniform(-0.5, 1, 1, 1, 1).clamp(0)
    )
    edges = torch.arange(height, dtype=torch.float32)
    low, long = uniform(0, height, 2), uniform(0, height / 3, 2)
    inside = (edges >= low[..., None]) & (edges < (low + long)[..., None])
    patch = (inside[:, 0, :, None] & inside[:, 1, None, :])[:, None]
    return torch.where(patch, uniform(-1, 1, 3, 1, 1), soft).clamp(-1, 1)


def _with_more_styles(renders: Renders, concepts: Sequence[Concept]) -> Renders:
    more = [(index, render(svg)) for index, concept in enumerate(concepts) for svg in concept.more_svgs.values()]
    owners = torch.tensor([index for index, _ in more])
    return Renders(
        np.concatenate([renders.images, np.stack([image for _, image in more])]),
        torch.cat([renders.concepts, owners]),
        torch.cat([renders.styles, torch.full_like(owners, NO_STYLE)]),
    )
