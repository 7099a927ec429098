"""The captions of a batch: embeddings by frozen text encoders, or tokens for trained text encoders."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flatlora_diffusion.config import ConfigError, DataConfig, RunError, TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.families.base import Base
from flatlora_diffusion.families.batch import Condition, joined, masked
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.tensor_io import cached_tensors, fingerprint

logger = logging.getLogger(__name__)


def read_prompts(file: Path) -> list[str]:
    """Read the prompts of a text file, one per line, without blank lines. Raises ConfigError if it is unreadable."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: give a UTF-8 text file with one prompt per line") from error
    return [line for line in lines if line]


class FrozenPrompts:
    """Captions encoded once by frozen text encoders, each a condition of one image."""

    def __init__(self, embeds: Mapping[str, Condition]) -> None:
        self._embeds = embeds

    def conditioning(self, captions: Sequence[str], mask: Tensor | None, device: torch.device) -> Condition:
        """Return the prompts of a Batch; a caption with mask 0 becomes zeros, such a base's unconditional input."""
        tensors = joined([self._embeds[caption] for caption in captions])
        condition = {name: value.to(device) for name, value in tensors.items()}
        return condition if mask is None else masked(condition, mask)


class EncodedPrompts:
    """Captions encoded in each step by frozen text encoders, because tag dropout or shuffling changes them."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def conditioning(self, captions: Sequence[str], mask: Tensor | None, device: torch.device) -> Condition:
        """Return the prompts of a Batch."""
        embeds = {caption: self._base.encode_prompts([caption]) for caption in dict.fromkeys(captions)}
        return FrozenPrompts(embeds).conditioning(captions, mask, device)


class TokenizedPrompts:
    """Tokens of captions, for trained text encoders."""

    def __init__(self, base: Base) -> None:
        self._base = base

    def conditioning(self, captions: Sequence[str], mask: Tensor | None, device: torch.device) -> Condition:
        """Return the prompts of a Batch."""
        mask = torch.ones(len(captions)) if mask is None else mask.float()
        return {name: value.to(device) for name, value in self._base.tokenize(captions, mask).items()}


Prompts = FrozenPrompts | EncodedPrompts | TokenizedPrompts


def build_prompts(config: TrainConfig, base: Base, samples: Sequence[Sample], folder: Path | None) -> Prompts:
    """Prepare the captions of a run, and warn of captions that are too long.

    Args:
        folder: where embeddings are cached for later runs; None for no cache.
    """
    _warn_of_truncation(base, samples)
    if config.trains_text:
        return TokenizedPrompts(base)
    if config.data.draws_captions:
        return EncodedPrompts(base)
    captions = {sample.caption for sample in samples}
    if config.objective.prior_from_base:
        captions.add(str(config.data.class_prompt))
    if config.data.caption_dropout > 0 and not base.zeros_empty_prompt:
        captions.add("")
    return _encode(base, captions, folder if config.data.cache_text_embeddings else None)


def augmented_caption(caption: str, data: DataConfig, seed: int, name: str, epoch: int) -> str:
    """Return the caption of image `name` in `epoch` after tag dropout and shuffling, a function of these and `seed`.

    Tags are separated by commas; the first `keep_tags` of them are never dropped or moved.
    """
    if not data.draws_captions:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, others = tags[: data.keep_tags], tags[data.keep_tags :]
    rng = generator("cpu", seed, "tags", name, epoch)
    is_kept = torch.rand(len(others), generator=rng) >= data.tag_dropout
    order = torch.randperm(len(others), generator=rng).tolist() if data.shuffle_tags else range(len(others))
    return ", ".join([*first, *(others[index] for index in order if is_kept[index])])


def _warn_of_truncation(base: Base, samples: Iterable[Sample]) -> None:
    """Warn of captions that are longer than the input of the text encoders."""
    names, limit = [], base.max_tokens
    lengths: dict[str, int] = {}
    for sample in samples:
        text = sample.caption
        if text not in lengths:
            lengths[text] = base.count_tokens(text)
        if lengths[text] > limit:
            names.append(sample.id)
    if names:
        have = "1 image has a caption" if len(names) == 1 else f"{len(names)} images have captions"
        which = names[0] if len(names) == 1 else f"{names[0]} the first"
        logger.warning(
            "%s of more than %d tokens (%s): the text after them is ignored; shorten it", have, limit, which
        )


def _encode(base: Base, captions: set[str], folder: Path | None) -> FrozenPrompts:
    """Encode each caption once; in `folder` the embeddings are cached for later runs."""
    encoders = base.text_encoders.values()
    encoders_key = "" if folder is None else json.dumps([*map(fingerprint, encoders), base.clip_skip])
    embeds = {}
    for caption in sorted(captions):
        path = None if folder is None else folder / f"prompt-{_digest(encoders_key, caption)}.safetensors"
        embeds[caption] = cached_tensors(path, partial(_embeds, base, caption))
    return FrozenPrompts(embeds)


def _embeds(base: Base, caption: str) -> dict[str, Tensor]:
    embeds = base.encode_prompts([caption])
    broken = [value for value in embeds.values() if not value.isfinite().all()]
    if broken:
        precision = str(broken[0].dtype).removeprefix("torch.")
        raise RunError(
            f"the text encoders give embeddings in {precision} that are not finite for the caption {caption!r}; give "
            "another --mixed_precision, or check that the base's files are complete"
        )
    return dict(embeds)


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
