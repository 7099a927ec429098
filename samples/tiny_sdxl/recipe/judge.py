"""The judge: a tiny CLIP that tells what an icon shows and in which of the four styles; it only scores images.

It is the one part of the sample that sees 3D icons. One render in ten is held out (the concept's other styles are
trained), so that its rate on drawings it never saw can be reported beside every number it gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from flatlora_diffusion.evaluation.judge import NAME_PROMPT, STYLE_PROMPTS, image_vectors, text_vectors
from flatlora_diffusion.storage.rng import generator
from samples.tiny_sdxl.recipe.loop import Schedule, train
from samples.tiny_sdxl.recipe.vae import to_pixels

if TYPE_CHECKING:  # importing it at run time needs the `recipe` extra, which only `collect_renders` does
    from samples.tiny_sdxl.recipe.icons import Concept

SCHEDULE = Schedule(steps=6500, learning_rate=1e-3, weight_decay=0.05, ema=0.995)
BATCH = 64  # images
EXTRA_NAMES = 128  # names without an image in the batch: negatives for image -> name that cost little
KEPT_PATCHES = 32  # of 64, at random, until FULL_FROM: twice the images per second and less to learn by heart
FULL_FROM = 0.8  # from this fraction of the steps on, the vision tower reads all patches, as it will in use
STYLE_WEIGHT = 0.5
HELD_OUT = 0.1
SIZE, PATCH, TOKENS = 64, 8, 32
STYLES = tuple(STYLE_PROMPTS)

Images = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Renders:
    """Renders of all concepts: (N, 64, 64, 3) images and, for each, the index of its concept and of its style."""

    images: Images
    concepts: Tensor
    styles: Tensor

    def take(self, rows: Tensor) -> Renders:
        return Renders(self.images[rows.numpy()], self.concepts[rows], self.styles[rows])


def collect_renders(concepts: Sequence[Concept], flat: Images) -> Renders:
    """The flat renders, given concept by concept and style by style as `flat64.npy` holds them, and the 3D ones."""
    from samples.tiny_sdxl.recipe.icons import load_3d

    owners = [(index, STYLES.index(style)) for index, concept in enumerate(concepts) for style in concept.flat_svgs]
    if len(owners) != len(flat):
        raise ValueError(f"{len(flat)} flat renders for {len(owners)} drawings: remove the stale flat64.npy")
    images_3d = [(index, concept.image_3d) for index, concept in enumerate(concepts) if concept.image_3d is not None]
    images = np.concatenate([flat, np.stack([load_3d(path) for _, path in images_3d])])
    owners += [(index, STYLES.index("fluent-3d")) for index, _ in images_3d]
    concept, style = torch.tensor(owners).unbind(dim=1)
    return Renders(images, concept, style)


def split_held_out(renders: Renders) -> tuple[Tensor, Tensor]:
    """Rows to train on and a tenth to hold out: one drawing each of seeded concepts that have two drawings or more."""
    count = len(renders.concepts)
    drawings = renders.concepts.bincount()
    held: dict[int, int] = {}
    for row in torch.randperm(count, generator=generator("cpu", 0, "judge", "held-out")).tolist():
        concept = int(renders.concepts[row])
        if drawings[concept] > 1 and len(held) < HELD_OUT * count:
            held.setdefault(concept, row)
    is_held = torch.zeros(count, dtype=torch.bool)
    is_held[list(held.values())] = True
    return (~is_held).nonzero().flatten(), is_held.nonzero().flatten()


def build_judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A randomly initialized judge of about 3.8 M parameters; call under a fixed seed."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TOKENS,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 240,
        "intermediate_size": 960,
        "num_hidden_layers": 4,
        "num_attention_heads": 5,
        "hidden_act": "gelu",
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """64-pixel RGB in [-1, 1], and the given tokenizer, cut at 32 tokens from now on."""
    tokenizer.model_max_length = TOKENS
    square = {"height": SIZE, "width": SIZE}
    half = [0.5] * 3
    images = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=square, image_mean=half, image_std=half)
    return CLIPProcessor(images, tokenizer)


def train_judge(
    concepts: Sequence[Concept], renders: Renders, tokenizer_folder: Path, work: Path, folder: Path
) -> None:
    """Train on the renders that are not held out; save model (fp16), tokenizer and image processor to `folder`."""
    torch.manual_seed(0)
    processor = build_processor(CLIPTokenizer.from_pretrained(tokenizer_folder))
    model = build_judge(processor.tokenizer).train()
    trained = renders.take(split_held_out(renders)[0])
    may_mirror = torch.tensor([can_mirror(concept) for concept in concepts])

    def loss_at(step: int) -> Tensor:
        rng = generator("cpu", 0, "judge", step)
        batch = trained.take(_rows_at(step, len(trained.concepts)))
        extra = torch.randint(0, len(concepts), (EXTRA_NAMES,), generator=rng)
        texts = [caption(concepts[index], rng) for index in batch.concepts.tolist()]
        texts += [NAME_PROMPT.format(concepts[index].name) for index in extra.tolist()]
        pixels = augment(to_pixels(batch.images), may_mirror[batch.concepts], rng)
        count = KEPT_PATCHES if step < FULL_FROM * SCHEDULE.steps else (SIZE // PATCH) ** 2
        kept = torch.rand(BATCH, (SIZE // PATCH) ** 2, generator=rng).argsort(dim=1)[:, :count]
        tokens = processor.tokenizer(
            [*texts, *STYLE_PROMPTS.values()], padding=True, truncation=True, return_tensors="pt"
        )
        with torch.autocast("cpu", torch.bfloat16), reading_patches(model, kept):
            image, text = image_vectors(model, pixels), text_vectors(model, tokens["input_ids"])
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        names, styles = (model.logit_scale.exp() * image @ text.T).split([len(texts), len(STYLES)], dim=1)
        owners = torch.cat([batch.concepts, extra])
        return name_loss(names, owners) + STYLE_WEIGHT * F.cross_entropy(styles, batch.styles)

    train(model, loss_at, SCHEDULE, work / "judge.safetensors")
    model.half().save_pretrained(folder)
    processor.save_pretrained(folder)


def name_loss(logits: Tensor, owners: Tensor) -> Tensor:
    """Symmetric InfoNCE of B images and their captions; two drawings of one concept are never each other's negatives.

    `logits`, (B, B + E): image b against the B captions, its own in column b, and E more names. `owners`, (B + E,):
    the concept of each column, and so of each image.
    """
    count = len(logits)
    is_same = owners[:count, None] == owners[None, :]
    is_own = torch.eye(*logits.shape, dtype=torch.bool)
    logits = logits.masked_fill(is_same & ~is_own, float("-inf"))
    target = torch.arange(count)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, :count].T, target)) / 2


@contextmanager
def reading_patches(model: CLIPModel, kept: Tensor) -> Iterator[None]:
    """Inside, the vision tower reads only the patches `kept`, (B, K), of each image (FLIP, arXiv:2212.00794)."""
    tokens = F.pad(kept + 1, (1, 0))[..., None]  # token 0 is the class token

    def select(_module: nn.Module, _inputs: tuple[Tensor, ...], embeddings: Tensor) -> Tensor:
        return embeddings.gather(1, tokens.expand(-1, -1, embeddings.shape[-1]))

    hook = model.vision_model.embeddings.register_forward_hook(select)
    try:
        yield
    finally:
        hook.remove()


def caption(concept: Concept, rng: torch.Generator) -> str:
    """Mostly the sentence that scores images, sometimes the name alone or a few tags."""
    kind = float(torch.rand((), generator=rng))
    if kind < 0.7:
        return NAME_PROMPT.format(concept.name)
    if kind < 0.9 or not concept.tags:
        return concept.name
    order = torch.randperm(len(concept.tags), generator=rng).tolist()
    return ", ".join(concept.tags[index] for index in order[:4])


def augment(pixels: Tensor, may_mirror: Tensor, rng: torch.Generator) -> Tensor:
    """What generated images differ in from renders: place, size, angle, colour, sharpness, noise.

    (B, 3, H, W) in [-1, 1], and (B,) which rows may be mirrored.
    """
    batch = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(batch, *shape, generator=rng)

    moved = _moved(pixels, torch.where(may_mirror & (uniform(0, 1) < 0.5), -1.0, 1.0), uniform)
    grey = moved.mean(dim=1, keepdim=True)
    vivid = grey + uniform(0.75, 1.25, 1, 1, 1) * (moved - grey)
    lit = vivid * uniform(0.92, 1.06, 3, 1, 1) + uniform(-0.08, 0.08, 1, 1, 1)
    soft = torch.lerp(lit, _blurred(_blurred(lit)), uniform(-1.0, 1.0, 1, 1, 1).clamp(min=0))
    blotches = F.interpolate(torch.randn(batch, 3, 8, 8, generator=rng), pixels.shape[-2:], mode="bilinear")
    grain = torch.randn(pixels.shape, generator=rng)
    return (soft + uniform(0, 0.06, 1, 1, 1) * blotches + uniform(0, 0.05, 1, 1, 1) * grain).clamp(-1, 1)


def _moved(pixels: Tensor, mirror: Tensor, uniform: Callable[..., Tensor]) -> Tensor:
    """Shifted up to 3 pixels, scaled, rotated up to 6 degrees, mirrored where `mirror` is -1; white outside."""
    zoom, angle, shift = uniform(0.92, 1.1), uniform(-0.1, 0.1), uniform(-0.1, 0.1, 2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = torch.stack([mirror * cos, -sin, shift[:, 0], mirror * sin, cos, shift[:, 1]], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels - 1, grid, align_corners=False) + 1


def _blurred(pixels: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


def can_mirror(concept: Concept) -> bool:
    """Animals, food and things mean the same from both sides; people's gestures, signs and moons may not."""
    return concept.group in (3, 4, 6, 7) and not {"left", "right"} & set(concept.name.replace("-", " ").split())


def _rows_at(step: int, count: int) -> Tensor:
    """The rows of batch `step`: every row at most once per epoch, in an order of the epoch's own."""
    epoch, place = divmod(step, count // BATCH)
    order = torch.randperm(count, generator=generator("cpu", 0, "judge", "order", epoch))
    return order[place * BATCH : (place + 1) * BATCH]
