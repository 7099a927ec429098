"""Captions of tags with commas between them, drawn anew for each showing: in another order, and not all of them."""

from __future__ import annotations

import torch

from flatlora_diffusion.config import DataConfig
from flatlora_diffusion.storage.rng import generator


def drawn_caption(caption: str, data: DataConfig, seed: int, name: str, epoch: int) -> str:
    """The caption of image `name` in `epoch`: a function of these and the seed.

    The first `keep_tags` tags stay where and what they are; of the others each is dropped with the probability
    `tag_dropout`, and with `shuffle_tags` what is left is shuffled.
    """
    if not data.draws_captions:
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, others = tags[: data.keep_tags], tags[data.keep_tags :]
    rng = generator("cpu", seed, "tags", name, epoch)
    kept = torch.rand(len(others), generator=rng) >= data.tag_dropout
    order = torch.randperm(len(others), generator=rng).tolist() if data.shuffle_tags else range(len(others))
    return ", ".join([*first, *(others[place] for place in order if kept[place])])
