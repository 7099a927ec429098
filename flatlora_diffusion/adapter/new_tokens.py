"""Pivotal tuning: new tokens whose embeddings are trained beside the frozen vocabulary of both text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.config import ConfigError, TokenConfig
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.run_dir import EMBEDDINGS_FILE
from flatlora_diffusion.storage.tensor_io import save_tensors

PULL = 0.1  # the share of its excess, in powers, that the spread of the new rows loses in each step
# The names under which other tools look for the embeddings of the first and the second encoder.
FILE_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table, never written, and `new` rows (K, D) in fp32 behind it that are trained."""

    def __init__(self, table: nn.Embedding, new: Tensor) -> None:
        super().__init__()
        self.table = table
        self.table_std = table.weight.detach().float().std()
        # A module of its own, behind the table: a text encoder's dtype is that of its first parameter.
        self.new = nn.Embedding.from_pretrained(new, freeze=False)

    @property
    def weight(self) -> Tensor:
        """All rows, (V + K, D) in the table's dtype."""
        return torch.cat([self.table.weight, self.new.weight.to(self.table.weight.dtype)])

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings of ids (B, L), (B, L, D) in the table's dtype."""
        rows = self.table.num_embeddings
        is_new = ids >= rows
        known = self.table(ids.masked_fill(is_new, 0))
        fresh = self.new((ids - rows).clamp(min=0)).to(known.dtype)
        return torch.where(is_new[..., None], fresh, known)


def new_tokens(config: TokenConfig) -> dict[str, list[str]]:
    """The new tokens `<s0>`, `<s1>`, ... of each placeholder word, in order."""
    if not config.placeholders:
        raise ConfigError("token_abstraction is empty; name the word in the prompts that stands for the new tokens")
    count = config.num_new_tokens_per_abstraction
    return {word: [f"<s{place * count + i}>" for i in range(count)] for place, word in enumerate(config.placeholders)}


def with_new_tokens(text: str, tokens: Mapping[str, list[str]]) -> str:
    """`text` with each placeholder word replaced by its tokens."""
    for word, names in tokens.items():
        text = text.replace(word, "".join(names))
    return text


def in_captions(samples: Sequence[Any], tokens: Mapping[str, list[str]]) -> list[Any]:
    """The samples, dataclasses with a `caption`, with each placeholder word in it replaced by its tokens."""
    return [dataclasses.replace(one, caption=with_new_tokens(one.caption, tokens)) for one in samples]


def add_tokens(pipeline: Any, config: TokenConfig, seed: int) -> dict[str, list[str]]:
    """Teach both tokenizers and text encoders the new tokens; returns them by placeholder.

    A new row starts as noise with the standard deviation of the table's entries, a function of the seed. Raises
    ConfigError when a tokenizer knows one of the tokens already.
    """
    tokens = new_tokens(config)
    names = [name for group in tokens.values() for name in group]
    for part, key in zip(FILE_KEYS, ("tokenizer", "tokenizer_2"), strict=True):
        encoder, tokenizer = getattr(pipeline, part), getattr(pipeline, key)
        table = encoder.get_input_embeddings()
        first = len(tokenizer)
        added = tokenizer.add_tokens(names)
        if added != len(names) or first != table.num_embeddings:
            raise ConfigError(
                f"the base's {key} has tokens such as {names[0]} already; pivotal tuning needs a fresh one"
            )
        rows = torch.randn(len(names), table.embedding_dim, generator=generator("cpu", seed, "new_tokens", part))
        extended = ExtendedEmbedding(table, rows.to(table.weight.device))
        extended.new.weight.data *= extended.table_std
        encoder.set_input_embeddings(extended)
    return tokens


def embedding_parameters(pipeline: Any) -> dict[str, nn.Parameter]:
    """The trained rows by part; empty without pivotal tuning."""
    tables = {part: getattr(pipeline, part).get_input_embeddings() for part in FILE_KEYS}
    return {part: table.new.weight for part, table in tables.items() if isinstance(table, ExtendedEmbedding)}


@torch.no_grad()
def pull_embeddings(pipeline: Any) -> None:
    """Pull the standard deviation of the trained rows towards that of the table's entries, by `PULL`.

    As diffusers' script does after each step, so that the new words stay as long as those that the encoders know.
    """
    for part, rows in embedding_parameters(pipeline).items():
        usual = getattr(pipeline, part).get_input_embeddings().table_std
        rows.mul_((usual.to(rows.device) / rows.std()) ** PULL)


def save_embeddings(pipeline: Any, folder: Path) -> Path | None:
    """Write the new rows for `load_textual_inversion` of a stock pipeline; None without pivotal tuning."""
    rows = {FILE_KEYS[part]: parameter for part, parameter in embedding_parameters(pipeline).items()}
    if not rows:
        return None
    save_tensors(folder / EMBEDDINGS_FILE, rows)
    return folder / EMBEDDINGS_FILE
