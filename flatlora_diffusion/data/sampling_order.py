"""Which samples each micro-batch trains on: a function of (seed, place in the run), with or without aspect buckets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from flatlora_diffusion.storage.rng import generator


@dataclass(frozen=True)
class Pick:
    """One image of a batch: the sample's index and the epoch (or repeat) that its crop and flip are drawn for."""

    sample: int
    epoch: int


class Order:
    """The order of `count` samples in which each is shown `repeats` times per epoch, anew shuffled in each epoch."""

    def __init__(self, seed: int, purpose: str, count: int, repeats: int, batch_size: int) -> None:
        self.key = (seed, purpose)
        self.count, self.repeats, self.batch_size = count, repeats, batch_size

    @property
    def samples_per_epoch(self) -> int:
        return self.count * self.repeats

    def batch(self, index: int) -> list[Pick]:
        """The batch at `index` of the endless row of samples that one epoch after the other makes."""
        first = index * self.batch_size
        return [self._at(place) for place in range(first, first + self.batch_size)]

    def _at(self, place: int) -> Pick:
        epoch, position = divmod(place, self.samples_per_epoch)
        repeat, sample = divmod(_permutation(*self.key, epoch, self.samples_per_epoch)[position], self.count)
        return Pick(sample, epoch * self.repeats + repeat)


class BucketOrder:
    """The same with batches of one bucket each: `buckets[i]` is the bucket of sample i.

    A bucket whose samples do not fill its last batch shows some of them once more; so each sample is shown at least
    `repeats` times per epoch.
    """

    def __init__(self, seed: int, purpose: str, buckets: Sequence[int], repeats: int, batch_size: int) -> None:
        self.key = (seed, purpose)
        self.repeats, self.batch_size = repeats, batch_size
        self.members: dict[int, list[int]] = {}
        for sample, bucket in enumerate(buckets):
            self.members.setdefault(bucket, []).append(sample)
        self.batches_per_epoch = sum(self._batches(len(members)) for members in self.members.values())

    @property
    def samples_per_epoch(self) -> int:
        return self.batches_per_epoch * self.batch_size

    def batch(self, index: int) -> list[Pick]:
        """The batch at `index` of the endless row of batches that one epoch after the other makes."""
        epoch, place = divmod(index, self.batches_per_epoch)
        chosen = _permutation(*self.key, epoch, self.batches_per_epoch)[place]
        bucket, chosen = self._bucket_of(chosen)
        members = self.members[bucket]
        order = _permutation(self.key[0], f"{self.key[1]}/{bucket}", epoch, len(members) * self.repeats)
        places = range(chosen * self.batch_size, (chosen + 1) * self.batch_size)
        shown = [(order[place % len(order)], place // len(order)) for place in places]
        span = self.repeats * (self.batch_size + 1)  # views that one sample can be shown in within an epoch
        return [
            Pick(members[entry % len(members)], epoch * span + again * self.repeats + entry // len(members))
            for entry, again in shown
        ]

    def _bucket_of(self, batch: int) -> tuple[int, int]:
        """The bucket of the `batch`-th batch of an epoch before shuffling, and its place within the bucket."""
        for bucket, members in self.members.items():
            if batch < self._batches(len(members)):
                return bucket, batch
            batch -= self._batches(len(members))
        raise IndexError(batch)

    def _batches(self, members: int) -> int:
        return -(-members * self.repeats // self.batch_size)


@lru_cache(maxsize=64)
def _permutation(seed: int, purpose: str, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=generator("cpu", seed, purpose, epoch)).tolist()
