"""Captioning models: BLIP and Florence-2, which write sentences, and WD14 taggers (`tagger.py`); inference only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from flatlora_diffusion.config import CAPTION_WRITERS, ConfigError
from flatlora_diffusion.evaluation.encoders import load_image_reader, load_weights
from flatlora_diffusion.evaluation.tagger import Thresholds, find_tagger, load_tagger
from flatlora_diffusion.storage.hub_errors import loading_failure

Captioner = Callable[[Sequence[Image.Image]], list[str]]

_MAX_TOKENS = 75  # the length of SDXL's prompts
_FLORENCE_TASK = "Describe in detail what is shown in the image."  # a task of Florence-2's training
_KINDS = (
    "give a folder or hub id of a BLIP, of a Florence-2 in transformers' own format (such as "
    "florence-community/Florence-2-base), or of a WD14 tagger (such as SmilingWolf/wd-swinv2-tagger-v3)"
)
# Errors of transformers for a config.json of another format; unknown parts are KeyErrors.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError)


def load_captioner(
    name_or_path: str,
    trigger: str = "",
    thresholds: Thresholds | None = None,
    device: torch.device | str = "cpu",
    max_tokens: int = _MAX_TOKENS,
) -> Captioner:
    """Load a deterministic function from images to captions.

    Args:
        name_or_path: folder or hub id of a BLIP, a Florence-2 or a WD14 tagger.
        trigger: a word to include in every caption.
        thresholds: of a tagger's tags.
        max_tokens: of a sentence, which is decoded greedily.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    files = find_tagger(name_or_path)
    if files is not None:
        tags = load_tagger(name_or_path, files, thresholds or Thresholds())
        return lambda images: [", ".join([trigger] * bool(trigger) + words) for words in tags(images)]
    sentences = _load_writer(name_or_path, device, max_tokens)
    ending = f", in the style of {trigger}" if trigger else ""
    return lambda images: [f"{text}{ending}" for text in sentences(images)]


def _load_writer(name_or_path: str, device: torch.device | str, max_tokens: int) -> Captioner:
    try:
        kind = AutoConfig.from_pretrained(name_or_path).model_type
        if kind not in CAPTION_WRITERS:
            raise ConfigError(f"captioner {name_or_path!r} is a {kind} model; {_KINDS}")
        model = load_weights(getattr(transformers, CAPTION_WRITERS[kind]), name_or_path, "captioner")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except ConfigError:
        raise
    except _LOAD_ERRORS as error:
        why = loading_failure(name_or_path, error)
        raise ConfigError(f"captioner {name_or_path!r} cannot be loaded: {why}; {_KINDS}") from error
    model.to(device)
    to_pixels = load_image_reader(name_or_path)
    inputs = _florence_inputs(model, tokenizer) if kind == "florence2" else lambda pixels: {}

    @torch.inference_mode()
    def captions(images: Sequence[Image.Image]) -> list[str]:
        pixels = to_pixels(images).to(device)
        ids = model.generate(
            pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=max_tokens, **inputs(pixels)
        )
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    return captions


def _florence_inputs(model: Any, tokenizer: Any) -> Callable[[Tensor], dict[str, Tensor]]:
    """Create the text input of Florence-2 for pixels (B, 3, H, W): a placeholder per image token, then the task."""
    words = [tokenizer.bos_token_id, *tokenizer(_FLORENCE_TASK, add_special_tokens=False).input_ids]
    image_tokens: dict[torch.Size, int] = {}  # by the shape of the pixels

    def inputs(pixels: Tensor) -> dict[str, Tensor]:
        if pixels.shape[1:] not in image_tokens:
            image_tokens[pixels.shape[1:]] = model.get_image_features(pixels[:1]).pooler_output.shape[1]
        image = [model.config.image_token_id] * image_tokens[pixels.shape[1:]]
        row = torch.tensor([*image, *words, tokenizer.eos_token_id], device=pixels.device)
        ids = row.expand(len(pixels), -1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return inputs
