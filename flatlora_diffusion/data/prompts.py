"""The captions of a batch: embeddings by frozen text encoders, or tokens for trained text encoders."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flatlora_diffusion.config import ConfigError, DataConfig, RunError, TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.sdxl.pipeline import Sdxl, encode_prompts
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
    """Captions encoded once by frozen text encoders: (1, 77, D) and pooled (1, P) each."""

    def __init__(self, embeds: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._embeds = embeds

    def conditioning(self, captions: Sequence[str], mask: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """Return the prompt fields of a Batch; a caption with mask 0 becomes zeros, SDXL's unconditional input."""
        pairs = [self._embeds[caption] for caption in captions]
        prompt_embeds, pooled = (torch.cat(parts).to(device) for parts in zip(*pairs, strict=True))
        if mask is not None:
            factors = mask.to(prompt_embeds)
            prompt_embeds, pooled = prompt_embeds * factors[:, None, None], pooled * factors[:, None]
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


class EncodedPrompts:
    """Captions encoded in each step by frozen text encoders, because tag dropout or shuffling changes them."""

    def __init__(self, sdxl: Sdxl) -> None:
        self._sdxl = sdxl

    def conditioning(self, captions: Sequence[str], mask: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """Return the prompt fields of a Batch."""
        embeds = {caption: encode_prompts(self._sdxl, [caption]) for caption in dict.fromkeys(captions)}
        return FrozenPrompts(embeds).conditioning(captions, mask, device)


class TokenizedPrompts:
    """Tokens of captions, for trained text encoders."""

    def __init__(self, pipeline: Any) -> None:
        self._tokenizers = pipeline.tokenizer, pipeline.tokenizer_2

    def conditioning(self, captions: Sequence[str], mask: Tensor | None, device: torch.device) -> dict[str, Any]:
        """Return the prompt fields of a Batch."""
        ids = torch.stack([tokenize(tokenizer, captions) for tokenizer in self._tokenizers], dim=1)
        mask = torch.ones(len(captions)) if mask is None else mask.float()
        return {
            "prompt_embeds": None,
            "pooled_prompt_embeds": None,
            "input_ids": ids.to(device),
            "caption_mask": mask.to(device),
        }


Prompts = FrozenPrompts | EncodedPrompts | TokenizedPrompts


def build_prompts(config: TrainConfig, sdxl: Sdxl, samples: Sequence[Sample], folder: Path | None) -> Prompts:
    """Prepare the captions of a run, and warn of captions that are too long.

    Args:
        folder: where embeddings are cached for later runs; None for no cache.
    """
    _warn_of_truncation(sdxl.pipeline, samples)
    if config.trains_text:
        return TokenizedPrompts(sdxl.pipeline)
    if config.data.draws_captions:
        return EncodedPrompts(sdxl)
    captions = {sample.caption for sample in samples}
    if config.objective.prior_from_base:
        captions.add(str(config.data.class_prompt))
    if config.data.caption_dropout > 0 and not sdxl.zeros_empty_prompt:
        captions.add("")
    return _encode(sdxl, captions, folder if config.data.cache_text_embeddings else None)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Return token ids (B, 77), truncated and padded as in StableDiffusionXLPipeline."""
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


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


def _warn_of_truncation(pipeline: Any, samples: Iterable[Sample]) -> None:
    """Warn of captions that are longer than the input of the text encoders."""
    tokenizers = pipeline.tokenizer, pipeline.tokenizer_2
    names, limit = [], min(tokenizer.model_max_length for tokenizer in tokenizers)
    lengths: dict[str, int] = {}
    for sample in samples:
        text = sample.caption
        if text not in lengths:
            # Plus the start token and the end token.
            lengths[text] = 2 + max(len(tokenizer.tokenize(text)) for tokenizer in tokenizers)
        if lengths[text] > limit:
            names.append(sample.id)
    if names:
        have = "1 image has a caption" if len(names) == 1 else f"{len(names)} images have captions"
        which = names[0] if len(names) == 1 else f"{names[0]} the first"
        logger.warning(
            "%s of more than %d tokens (%s): the text after them is ignored; shorten it", have, limit, which
        )


def _encode(sdxl: Sdxl, captions: set[str], folder: Path | None) -> FrozenPrompts:
    """Encode each caption once; in `folder` the embeddings are cached for later runs."""
    encoders = [sdxl.pipeline.text_encoder, sdxl.pipeline.text_encoder_2]
    encoders_key = "" if folder is None else json.dumps([*map(fingerprint, encoders), sdxl.clip_skip])
    embeds = {}
    for caption in sorted(captions):
        path = None if folder is None else folder / f"prompt-{_digest(encoders_key, caption)}.safetensors"
        tensors = cached_tensors(path, partial(_embeds, sdxl, caption))
        embeds[caption] = tensors["prompt_embeds"], tensors["pooled_prompt_embeds"]
    return FrozenPrompts(embeds)


def _embeds(sdxl: Sdxl, caption: str) -> dict[str, Tensor]:
    prompt_embeds, pooled = encode_prompts(sdxl, [caption])
    if not (prompt_embeds.isfinite().all() and pooled.isfinite().all()):
        precision = str(prompt_embeds.dtype).removeprefix("torch.")
        raise RunError(
            f"the text encoders give embeddings in {precision} that are not finite for the caption {caption!r}; give "
            "another --mixed_precision, or check that the base's files are complete"
        )
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
