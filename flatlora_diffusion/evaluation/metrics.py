"""Metrics of generated images, from unit vectors of images and texts: similarity, fidelity, drift, diversity, copying.

Functions of vectors give one value per image or per prompt; `picture_metrics` and `judge_metrics` average them into
named floats, and `described` says what each name means. Knows nothing about how the images were made.
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

STYLE = "fluent-3d"  # of the judge's four styles the one that is trained


class Metric(NamedTuple):
    """One of the named floats; `better` is None where neither direction is good in itself."""

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
    """Mean cosine of each image with the training images, (B, D), (N, D) -> (B,)."""
    return (images @ training.T).mean(dim=1)


def pair_cosines(images: Tensor, others: Tensor) -> Tensor:
    """Cosine of row b of one with row b of the other, (B, D), (B, D) -> (B,)."""
    return (images * others).sum(dim=1)


def drifts(base: Tensor, adapted: Tensor) -> Tensor:
    """(1 - cosine) / 2 of rows of one prompt and seed, (B, D), (B, D) -> (B,) in [0, 1]; exactly 0 for equal rows.

    For unit vectors this is a quarter of the squared distance.
    """
    return (base - adapted).square().sum(dim=1) / 4


def diversities(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """Mean 1 - cosine over the pairs of images of one prompt; prompts with a single image are left out.

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
    """Largest cosine of each image to any training image, (B, D), (N, D) -> (B,)."""
    return (images @ training.T).amax(dim=1)


def own_nearest_cosines(training: Tensor) -> Tensor:
    """Largest cosine of each training image to any *other* one (leave-one-out), (N, D) -> (N,); N is at least 2."""
    cosines = training @ training.T
    return cosines.fill_diagonal_(-torch.inf).amax(dim=1)


def memorization_threshold(training: Tensor, quantile: float = 0.95) -> float:
    """The cosine that this share of the training images stays below with its nearest fellow, (N, D) -> float.

    Coarse with few training images: new images of the same kind can lie above it much more often than 1 - `quantile`.
    """
    return float(own_nearest_cosines(training).quantile(quantile))


@dataclass(frozen=True)
class Reference:
    """The encoded images and texts that generated images are compared with: training, held-out and base images."""

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
    """The reference of `picture_metrics`.

    `base` are the pictures of the base model for every (prompt, seed) that will be measured; `heldout` maps a prompt
    to the real image it describes; `texts` maps a prompt to the text that its images are compared with, where that
    is not the prompt itself (for the judge: `an icon of a fox`).
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
    """The metrics of one model, by the keys of `METRICS`.

    `pictures` are of prompts in the learned style, `unrelated` of prompts that the LoRA should leave alone. A key is
    missing where nothing defines it: `prompt_fidelity` of an encoder without text, `drift` without unrelated
    prompts, `diversity` with one seed per prompt, `heldout_similarity` without a held-out image of any prompt,
    `memorized_share` with a single training image. Raises ValueError for a picture that the base has no fellow of.
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
    """`name_found` and `style_probability` of the pictures, as the judge sees them.

    `names` maps each prompt to the name of what it shows; `candidates` are the names it is told from, itself
    included. Raises KeyError or ValueError for a prompt without a name or a name that is no candidate.
    """
    images = [centre_square(image) for image in pictures.values()]
    right = torch.tensor([candidates.index(names[prompt]) for prompt, _ in pictures])
    styles = style_probabilities(judge, images)[:, list(STYLE_PROMPTS).index(STYLE)]
    return {
        "name_found": _mean(rank_of(rank_names(judge, images, candidates), right) == 0),
        "style_probability": _mean(styles),
    }


def described(keys: Iterable[str]) -> list[dict[str, str | int | None]]:
    """Key, name, better, help and digits of each key, in the given order.

    A key may have a prefix that tells encoders apart, such as `dino_drift`; the name then ends with `(dino)`. Raises
    KeyError for a key that ends with no metric's.
    """
    rows: list[dict[str, str | int | None]] = []
    for key in keys:
        ends = [metric for metric in METRICS if key == metric.key or key.endswith(f"_{metric.key}")]
        metric = max(ends, key=lambda metric: len(metric.key), default=None)
        if metric is None:
            raise KeyError(key)
        prefix = key.removesuffix(metric.key).rstrip("_")
        rows.append({**metric._asdict(), "key": key, "name": metric.name + (f" ({prefix})" if prefix else "")})
    return rows


def _base_of(reference: Reference, pictures: Pictures) -> Tensor:
    missing = [key for key in pictures if key not in reference.base]
    if missing:
        raise ValueError(f"{len(missing)} pictures have no picture of the base beside them, such as {missing[0]}")
    return torch.stack([reference.base[key] for key in pictures])


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
