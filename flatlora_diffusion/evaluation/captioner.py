"""A captioner: one sentence that says what an image shows, by a BLIP of transformers; inference only."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoTokenizer, BlipForConditionalGeneration

from flatlora_diffusion.config import ConfigError
from flatlora_diffusion.evaluation.preprocessing import load_vision_input

Captioner = Callable[[Sequence[Image.Image]], list[str]]


def load_captioner(name_or_path: str, device: torch.device | str = "cpu", max_tokens: int = 30) -> Captioner:
    """A function from images to captions: the likeliest word at each place (greedy), so it has no randomness.

    `name_or_path` is a BLIP captioning model with safetensors, in a folder or on the hub. Raises ConfigError else.
    """
    try:
        model = BlipForConditionalGeneration.from_pretrained(name_or_path, dtype=torch.float32, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"captioner {name_or_path!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    model.to(device).eval()
    vision_input = load_vision_input(name_or_path)

    @torch.inference_mode()
    def captions(images: Sequence[Image.Image]) -> list[str]:
        pixels = vision_input.pixels(images).to(device)
        ids = model.generate(pixel_values=pixels, do_sample=False, num_beams=1, max_new_tokens=max_tokens)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    return captions
