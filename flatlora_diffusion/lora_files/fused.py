"""A LoRA file in which a layer of the file is several layers of the base, as if it had these layers.

The layers share A, the alpha and the scale; B has the rows of each in turn, in equal parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from flatlora_diffusion.lora_files.safe_reading import CheckedFile, Entry


class Source(NamedTuple):
    """The tensor of the file that a tensor of a split layer is, or that it is part `number` of `parts` of."""

    key: str
    number: int = 0
    parts: int = 1


@dataclass(frozen=True)
class SplitFile(CheckedFile):
    """A file with its fused layers split.

    Attributes:
        whole: The file as it is.
        sources: By the names of the tensors of split layers.
    """

    whole: CheckedFile
    sources: Mapping[str, Source]

    def tensor(self, name: str) -> Tensor:
        key, number, parts = self.sources.get(name, Source(name))
        tensor = self.whole.tensor(key)
        return tensor if parts == 1 else tensor.chunk(parts)[number]


def split_fused(
    file: CheckedFile, split_name: Callable[[str], tuple[str, ...]], factors: Mapping[str, str], alpha: str
) -> CheckedFile:
    """Return the file with its fused layers split.

    Args:
        split_name: Gives the names of the layers in a layer of the file.
        factors: `up` or `down` by the ends of the tensors' names.
        alpha: The end of the name of an alpha.
    """
    entries: dict[str, Entry] = {}
    sources: dict[str, Source] = {}
    for key, entry in file.entries.items():
        end = next((end for end in (*factors, alpha) if key.endswith(end)), "")
        names = split_name(key.removesuffix(end)) if end else ("",)
        if len(names) == 1:
            entries[key] = entry
            continue
        # Rows that cannot be divided stay whole, so that the shape does not fit the base.
        is_divided = factors.get(end) == "up" and entry.shape and entry.shape[0] % len(names) == 0
        for index, name in enumerate(names):
            sources[name + end] = Source(key, index, len(names)) if is_divided else Source(key)
            rows = (entry.shape[0] // len(names), *entry.shape[1:]) if is_divided else entry.shape
            entries[name + end] = entry._replace(shape=rows)
    return SplitFile(file.path, file.metadata, entries, file, sources) if sources else file
