"""What stands in a batch for its captions: embeddings by frozen text encoders, or tokens for trained ones."""

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

from flatlora_diffusion.config import ConfigError, TrainConfig
from flatlora_diffusion.data.dataset import Sample
from flatlora_diffusion.sdxl.pipeline import Sdxl, encode_prompts
from flatlora_diffusion.storage.tensor_io import cached_tensors, fingerprint

logger = logging.getLogger(__name__)


def read_prompts(file: Path) -> list[str]:
    """The prompts of a text file, one per line, without blank ones. Raises ConfigError for one that cannot be read."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: give a UTF-8 text file with one prompt per line") from error
    return [line for line in lines if line]


class FrozenPrompts:
    """The embeddings of captions by frozen text encoders, (1, 77, D) and pooled (1, P) of each."""

    def __init__(self, embeds: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self._embeds = embeds

    def conditioning(self, captions: Sequence[str], kept: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """The prompt fields of a Batch; a caption with `kept` 0 is all zeros, as SDXL's unconditional half."""
        pairs = [self._embeds[caption] for caption in captions]
        prompt_embeds, pooled = (torch.cat(parts).to(device) for parts in zip(*pairs, strict=True))
        if kept is not None:
            factors = kept.to(prompt_embeds)
            prompt_embeds, pooled = prompt_embeds * factors[:, None, None], pooled * factors[:, None]
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


class EncodedPrompts:
    """Captions that are drawn anew in each step, encoded then by frozen text encoders."""

    def __init__(self, sdxl: Sdxl) -> None:
        self._sdxl = sdxl

    def conditioning(self, captions: Sequence[str], kept: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        """The prompt fields of a Batch."""
        each = {caption: encode_prompts(self._sdxl, [caption]) for caption in dict.fromkeys(captions)}
        return FrozenPrompts(each).conditioning(captions, kept, device)


class TokenizedPrompts:
    """Tokens of each caption, for text encoders that are trained."""

    def __init__(self, pipeline: Any) -> None:
        self._tokenizers = pipeline.tokenizer, pipeline.tokenizer_2

    def conditioning(self, captions: Sequence[str], kept: Tensor | None, device: torch.device) -> dict[str, Any]:
        """The prompt fields of a Batch."""
        ids = torch.stack([tokenize(tokenizer, captions) for tokenizer in self._tokenizers], dim=1)
        kept = torch.ones(len(captions)) if kept is None else kept.float()
        return {
            "prompt_embeds": None,
            "pooled_prompt_embeds": None,
            "input_ids": ids.to(device),
            "kept": kept.to(device),
        }


Prompts = FrozenPrompts | EncodedPrompts | TokenizedPrompts


def prompts_of(config: TrainConfig, sdxl: Sdxl, samples: Sequence[Sample], folder: Path | None) -> Prompts:
    """What a run with these samples has for their captions; captions that are cut are told of.

    With frozen text encoders each caption is encoded, once for all runs if it may be kept in `folder`.
    """
    _warn_of_cut(sdxl.pipeline, samples)
    if config.trains_text:
        return TokenizedPrompts(sdxl.pipeline)
    if config.data.draws_captions:
        return EncodedPrompts(sdxl)
    captions = {sample.caption for sample in samples}
    if config.objective.prior_from_base:
        captions.add(str(config.data.class_prompt))
    if config.data.caption_dropout > 0 and not sdxl.zeroes_no_prompt:
        captions.add("")
    return _encoded(sdxl, captions, folder if config.data.cache_text_embeddings else None)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids (B, 77), cut and padded as StableDiffusionXLPipeline does."""
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def _warn_of_cut(pipeline: Any, samples: Iterable[Sample]) -> None:
    """Tell of captions that are longer than what the text encoders read, by the images that have them."""
    tokenizers = pipeline.tokenizer, pipeline.tokenizer_2
    names, most = [], min(tokenizer.model_max_length for tokenizer in tokenizers)
    lengths: dict[str, int] = {}
    for sample in samples:
        text = sample.caption
        if text not in lengths:
            # Besides the text itself they read its start and its end.
            lengths[text] = 2 + max(len(tokenizer.tokenize(text)) for tokenizer in tokenizers)
        if lengths[text] > most:
            names.append(sample.id)
    if names:
        have = "1 image has a caption" if len(names) == 1 else f"{len(names)} images have captions"
        which = names[0] if len(names) == 1 else f"{names[0]} the first"
        logger.warning(
            "%s of more than %d tokens (%s): what comes after them is not read; shorten it", have, most, which
        )


def _encoded(sdxl: Sdxl, captions: set[str], folder: Path | None) -> FrozenPrompts:
    """Encode each caption once, in memory and, if a folder is given, there too, for later runs."""
    encoders = [sdxl.pipeline.text_encoder, sdxl.pipeline.text_encoder_2]
    mark = "" if folder is None else json.dumps([*map(fingerprint, encoders), sdxl.clip_skip])
    embeds = {}
    for caption in sorted(captions):
        path = None if folder is None else folder / f"prompt-{_digest(mark, caption)}.safetensors"
        kept = cached_tensors(path, partial(_embeds, sdxl, caption))
        embeds[caption] = kept["prompt_embeds"], kept["pooled_prompt_embeds"]
    return FrozenPrompts(embeds)


def _embeds(sdxl: Sdxl, caption: str) -> dict[str, Tensor]:
    prompt_embeds, pooled = encode_prompts(sdxl, [caption])
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def _digest(*parts: str) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
