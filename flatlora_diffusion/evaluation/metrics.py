"""Metrics of generated images from unit vectors: similarity, fidelity, drift, diversity and memorization.

Functions of vectors return one value per image or prompt; `picture_metrics` and `judge_metrics` average them by name,
and `describe_metrics` explains the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from flatlora_diffusion.evaluation.encoders import Encoder, centre_square
from flatlora_diffusion.evaluation.judge import STYLE_PROMPTS, Judge, rank_names, rank_of, style_probabilities

Pictures = Mapping[tuple[str, int], Image.Image]  # by (prompt, seed)

STYLE = "fluent-3d"  # the trained style among those of the judge


class Metric(NamedTuple):
    """The description of a metric; `better` is None if neither direction is good in itself."""

    key: str
    name: str
    better: str | None
    help: str
    digits: int


METRICS = (
    Metric(
        "image_similarity",
        "similarity to the training images",
        "higher",
        "Mean cosine of generated and training images (CLIP-I, DINO); read it with memorization: copies score best.",
        4,
    ),
    Metric(
        "heldout_similarity",
        "similarity to the held-out images",
        "higher",
        "Mean cosine of an image generated from a held-out caption and the real image of that caption.",
        4,
    ),
    Metric(
        "prompt_fidelity",
        "prompt fidelity",
        "higher",
        "Mean cosine of an image and the text it was generated from (CLIP-T).",
        4,
    ),
    Metric(
        "drift",
        "drift",
        "lower",
        "(1 - cosine) / 2 of base and adapted image of one unrelated prompt and seed: 0 is unchanged.",
        4,
    ),
    Metric(
        "style_change",
        "change of the style prompts",
        None,
        "(1 - cosine) / 2 of base and adapted image of one prompt in the learned style: how much the LoRA does.",
        4,
    ),
    Metric(
        "diversity",
        "diversity",
        "higher",
        "Mean of 1 - cosine over the pairs of seeds of one prompt: 0 when all seeds look the same.",
        4,
    ),
    Metric(
        "memorization",
        "memorization",
        "lower",
        "Mean over images of the largest cosine to any training image: 1 is a copy.",
        4,
    ),
    Metric(
        "memorized_share",
        "share of memorized images",
        "lower",
        "Share of images closer to a training image than 95 % of the training images are to each other.",
        3,
    ),
    Metric(
        "name_found",
        "names found",
        "higher",
        "Share of images for which the judge ranks the prompt's name first among all names.",
        3,
    ),
    Metric(
        "style_probability",
        "3D style",
        "higher",
        "Mean probability the judge gives to the 3D style against three flat icon styles.",
        3,
    ),
    Metric(
        "lpips_diversity",
        "LPIPS diversity",
        "higher",
        "Mean LPIPS distance over the pairs of seeds of one prompt: 0 when all seeds look the same.",
        4,
    ),
)


def image_similarity(images: Tensor, training: Tensor) -> Tensor:
    """Return the mean cosine of each image with the training images, (B, D), (N, D) -> (B,)."""
    return (images @ training.T).mean(dim=1)


def pair_cosines(images: Tensor, others: Tensor) -> Tensor:
    """Return the cosines of corresponding rows, (B, D), (B, D) -> (B,)."""
    return (images * others).sum(dim=1)


def drifts(base: Tensor, adapted: Tensor) -> Tensor:
    """Return (1 - cosine) / 2 of corresponding rows, (B, D), (B, D) -> (B,) in [0, 1]."""
    # A quarter of the squared distance of unit vectors, which is exactly 0 for equal rows.
    return (base - adapted).square().sum(dim=1) / 4


def diversities(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Return the mean of 1 - cosine over the pairs of images of each prompt that has at least two.

    `images` is (B, D); `prompts[b]` is the prompt of row b.
    """
    by_prompt = {}
    for prompt in dict.fromkeys(prompts):
        rows = images[[index for index, other in enumerate(prompts) if other == prompt]]
        if len(rows) > 1:
            first, second = torch.triu_indices(len(rows), len(rows), offset=1)
            by_prompt[prompt] = float((2 * drifts(rows[first], rows[second])).mean())
    return by_prompt


def nearest_cosines(images: Tensor, training: Tensor) -> Tensor:
    """Return the largest cosine of each image to any training image, (B, D), (N, D) -> (B,)."""
    return (images @ training.T).amax(dim=1)


def own_nearest_cosines(training: Tensor) -> Tensor:
    """Return the largest cosine of each training image to any other, (N, D) -> (N,); N is at least 2."""
    cosines = training @ training.T
    return cosines.fill_diagonal_(-torch.inf).amax(dim=1)


def memorization_threshold(training: Tensor, quantile: float = 0.95) -> float:
    """Return a quantile of the largest cosines between training images, (N, D) -> float.

    With few training images, new images of the same kind exceed it much more often than 1 - `quantile`.
    """
    return float(own_nearest_cosines(training).quantile(quantile))


@dataclass(frozen=True)
class Reference:
    """The encoded training, held-out and base images and texts that generated images are compared with."""

    encoder: Encoder
    training: Tensor
    base: Mapping[tuple[str, int], Tensor]
    heldout: Mapping[str, Tensor]
    texts: Mapping[str, str]


def encode_reference(
    encoder: Encoder,
    training: Sequence[Image.Image],
    base: Pictures,
    heldout: Mapping[str, Image.Image] | None = None,
    texts: Mapping[str, str] | None = None,
) -> Reference:
    """Create the reference of `picture_metrics`.

    Args:
        base: images of the base for every (prompt, seed) that will be measured.
        heldout: the real image that a prompt describes, by prompt.
        texts: the text to compare a prompt's images with, if not the prompt (for the judge: `an icon of a fox`).
    """
    heldout = heldout or {}
    return Reference(
        encoder,
        encoder.embed_images(training),
        dict(zip(base, encoder.embed_images(list(base.values())), strict=True)),
        dict(zip(heldout, encoder.embed_images(list(heldout.values())), strict=True)) if heldout else {},
        texts or {},
    )


def picture_metrics(reference: Reference, pictures: Pictures, unrelated: Pictures | None = None) -> dict[str, float]:
    """Return the metrics of one model by the keys of `METRICS`.

    Undefined metrics are missing: `prompt_fidelity` without text encoder, `drift` without unrelated prompts,
    `diversity` with one seed per prompt, `heldout_similarity` without held-out images, `memorized_share` with one
    training image.

    Args:
        pictures: images of prompts in the learned style.
        unrelated: images of prompts that the LoRA should not affect.

    Raises:
        ValueError: the base has no image for some (prompt, seed).
    """
    encoder, prompts = reference.encoder, [prompt for prompt, _ in pictures]
    images = encoder.embed_images(list(pictures.values()))
    nearest = nearest_cosines(images, reference.training)
    values = {
        "image_similarity": _mean(image_similarity(images, reference.training)),
        "style_change": _mean(drifts(_base_of(reference, pictures), images)),
        "memorization": _mean(nearest),
    }
    if len(reference.training) > 1:
        values["memorized_share"] = _mean(nearest > memorization_threshold(reference.training))
    real = [index for index, prompt in enumerate(prompts) if prompt in reference.heldout]
    if real:
        others = torch.stack([reference.heldout[prompts[index]] for index in real])
        values["heldout_similarity"] = _mean(pair_cosines(images[real], others))
    if encoder.texts is not None:
        distinct = list(dict.fromkeys(prompts))
        texts = encoder.embed_texts([reference.texts.get(prompt, prompt) for prompt in distinct])
        values["prompt_fidelity"] = _mean(pair_cosines(images, texts[[distinct.index(prompt) for prompt in prompts]]))
    by_prompt = diversities(images, prompts)
    if by_prompt:
        values["diversity"] = sum(by_prompt.values()) / len(by_prompt)
    if unrelated:
        values["drift"] = _mean(drifts(_base_of(reference, unrelated), encoder.embed_images(list(unrelated.values()))))
    return {metric.key: values[metric.key] for metric in METRICS if metric.key in values}


def judge_metrics(
    judge: Judge, pictures: Pictures, names: Mapping[str, str], candidates: Sequence[str]
) -> dict[str, float]:
    """Return `name_found` and `style_probability` of the pictures by the judge.

    Args:
        names: the name of the object by prompt.
        candidates: all names that the judge chooses from.

    Raises:
        KeyError: a prompt has no name.
        ValueError: a name is not among the candidates.
    """
    images = [centre_square(image) for image in pictures.values()]
    right = torch.tensor([candidates.index(names[prompt]) for prompt, _ in pictures])
    styles = style_probabilities(judge, images)[:, list(STYLE_PROMPTS).index(STYLE)]
    return {
        "name_found": _mean(rank_of(rank_names(judge, images, candidates), right) == 0),
        "style_probability": _mean(styles),
    }


def describe_metrics(keys: Iterable[str]) -> list[dict[str, str | int | None]]:
    """Return key, name, better, help and digits of each key, in order.

    A key may have a prefix for the encoder, such as `dino_drift`; the name then ends with `(dino)`. Raises KeyError
    for an unknown key.
    """
    rows: list[dict[str, str | int | None]] = []
    for key in keys:
        matches = [metric for metric in METRICS if key == metric.key or key.endswith(f"_{metric.key}")]
        metric = max(matches, key=lambda metric: len(metric.key), default=None)
        if metric is None:
            raise KeyError(key)
        prefix = key.removesuffix(metric.key).rstrip("_")
        rows.append({**metric._asdict(), "key": key, "name": metric.name + (f" ({prefix})" if prefix else "")})
    return rows


def _base_of(reference: Reference, pictures: Pictures) -> Tensor:
    missing = [key for key in pictures if key not in reference.base]
    if missing:
        raise ValueError(f"{len(missing)} pictures have no picture of the base, such as {missing[0]}")
    return torch.stack([reference.base[key] for key in pictures])


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
