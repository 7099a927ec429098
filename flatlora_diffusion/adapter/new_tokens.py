"""Pivotal tuning: trained embeddings of new tokens beside the frozen vocabulary of both text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatlora_diffusion.adapter.layers import parts_of
from flatlora_diffusion.config import TEXT_PARTS, ConfigError, TokenConfig
from flatlora_diffusion.storage.rng import generator
from flatlora_diffusion.storage.run_dir import EMBEDDINGS_FILE
from flatlora_diffusion.storage.tensor_io import save_tensors

PULL = 0.1  # exponent by which the std of the new rows approaches that of the table in each step
# The keys of both encoders' embeddings in the files of other tools.
FILE_KEYS = dict(zip(TEXT_PARTS, ("clip_l", "clip_g"), strict=True))


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table of V rows, followed by `new` trained rows (K, D) in fp32."""

    def __init__(self, table: nn.Embedding, new: Tensor) -> None:
        super().__init__()
        self.table = table
        self.table_std = table.weight.detach().float().std()
        # A submodule after the table: a text encoder's dtype is that of its first parameter.
        self.new = nn.Embedding.from_pretrained(new, freeze=False)

    @property
    def weight(self) -> Tensor:
        """All rows, (V + K, D) in the table's dtype."""
        return torch.cat([self.table.weight, self.new.weight.to(self.table.weight.dtype)])

    def forward(self, ids: Tensor) -> Tensor:
        """The embeddings (B, L, D) of ids (B, L), in the table's dtype."""
        rows = self.table.num_embeddings
        is_new = ids >= rows
        known = self.table(ids.masked_fill(is_new, 0))
        added = self.new((ids - rows).clamp(min=0)).to(known.dtype)
        return torch.where(is_new[..., None], added, known)


def new_tokens(config: TokenConfig) -> dict[str, list[str]]:
    """The new tokens `<s0>`, `<s1>`, ... of each placeholder word, in order."""
    if not config.placeholders:
        raise ConfigError("token_abstraction is empty; give the placeholder word of the prompts")
    count = config.num_new_tokens_per_abstraction
    return {word: [f"<s{place * count + i}>" for i in range(count)] for place, word in enumerate(config.placeholders)}


def replace_placeholders(text: str, tokens: Mapping[str, list[str]]) -> str:
    """`text` with each placeholder word replaced by its tokens."""
    for word, names in tokens.items():
        text = text.replace(word, "".join(names))
    return text


def replace_in_captions(samples: Sequence[Any], tokens: Mapping[str, list[str]]) -> list[Any]:
    """Copies of `samples`, dataclasses with a `caption`, in which tokens replace the placeholder words."""
    return [dataclasses.replace(sample, caption=replace_placeholders(sample.caption, tokens)) for sample in samples]


def add_tokens(pipeline: Any, config: TokenConfig, seed: int) -> dict[str, list[str]]:
    """Add the new tokens to both tokenizers and text encoders, with noise of the table's std as embeddings.

    Returns the new tokens by placeholder. Raises ConfigError if a tokenizer has such tokens already.
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
                f"the base's {key} has the token {names[0]} already; use a base without tokens of pivotal tuning"
            )
        rows = torch.randn(len(names), table.embedding_dim, generator=generator("cpu", seed, "new_tokens", part))
        extended = ExtendedEmbedding(table, rows.to(table.weight.device))
        extended.new.weight.data *= extended.table_std
        encoder.set_input_embeddings(extended)
    return tokens


def embedding_parameters(pipeline: Any) -> dict[str, nn.Parameter]:
    """The trained embeddings by part; empty without pivotal tuning."""
    encoders = [part for part in parts_of(pipeline) if part in FILE_KEYS]
    tables = {part: getattr(pipeline, part).get_input_embeddings() for part in encoders}
    return {part: table.new.weight for part, table in tables.items() if isinstance(table, ExtendedEmbedding)}


@torch.no_grad()
def rescale_embeddings(pipeline: Any) -> None:
    """Rescale the trained embeddings towards the table's std, as diffusers' script does in each step."""
    for part, rows in embedding_parameters(pipeline).items():
        table_std = getattr(pipeline, part).get_input_embeddings().table_std
        rows.mul_((table_std.to(rows.device) / rows.std()) ** PULL)


def save_embeddings(pipeline: Any, folder: Path) -> Path | None:
    """Save the embeddings for diffusers' `load_textual_inversion`; returns the file, None without pivotal tuning."""
    rows = {FILE_KEYS[part]: parameter for part, parameter in embedding_parameters(pipeline).items()}
    if not rows:
        return None
    save_tensors(folder / EMBEDDINGS_FILE, rows)
    return folder / EMBEDDINGS_FILE
