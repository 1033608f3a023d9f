"""An order of training images in which few shards are in use at a time, so that the others need not be on the disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class ShardOrder:
    """An epoch's images, shuffled by shards.

    The shards come in a random order, their images one after the other, cut into `parts` equally long segments. Each
    segment is shuffled within blocks of `block` shards and fills its own places of every batch, so that a batch has
    images of `parts` blocks. A process takes a range of the places of a batch, hence the segments of that range: where
    the number of processes divides `parts`, no two read the same segment, and the batches are the same for any number
    of processes. Every second segment runs backwards: the shard in which two of them meet is then in use once, at the
    beginning or at the end of the epoch, and not once at each.

    parts, block: at least 1.
    """

    parts: int = 8
    block: int = 4

    def draw(self, first: np.ndarray, members: np.ndarray, batch_size: int, rng: np.random.Generator) -> np.ndarray:
        """The images of an epoch in order, int32 (N,): `members`, each once.

        first: int64 (S,), the first image of each shard. members: int32 (N,), the images to visit. Both ascend.
        batch_size: of all processes together. What does not fill a batch comes last, from the shards drawn last.
        """
        row, begins = self._in_a_row(first, members, rng)
        batches = len(row) // batch_size
        bounds = np.arange(self.parts + 1) * batch_size // self.parts
        for part, (left, right) in enumerate(pairwise(bounds)):
            images = row[batches * left : batches * right]
            if part % 2:
                images[:] = images[::-1].copy()
            for start, stop in self._blocks(begins, batches * left, batches * right, part % 2 == 1):
                of_block = images[start:stop]
                of_block[:] = of_block[np.argsort(rng.random(stop - start), kind="stable")]
        order = np.empty_like(row)
        places = order[: batches * batch_size].reshape(batches, batch_size)
        for left, right in pairwise(bounds):
            places[:, left:right] = row[batches * left : batches * right].reshape(batches, right - left)
        rest = row[batches * batch_size :]
        order[batches * batch_size :] = rest[rng.permutation(len(rest))]
        return order

    def _blocks(self, begins: np.ndarray, first: int, last: int, backwards: bool) -> Iterator[tuple[int, int]]:
        """The blocks of the segment from place `first` to `last` of the row, each by its places in the segment.

        begins: int64 (S,), where in the row a shard begins. The segment runs backwards or not.
        """
        cuts = begins[(begins > first) & (begins < last)]
        cuts = last - cuts[::-1] if backwards else cuts - first
        ends = [0, *cuts[self.block - 1 :: self.block].tolist(), last - first]
        yield from pairwise(ends)

    def shards_in_use(self, processes: int, on_node: int, shards_ahead: float = 0.0) -> int:
        """The most shards that `on_node` of `processes` processes use at a time, with those that are fetched ahead.

        Of each segment these are a block, the next one, and as many shards that a reader has not let go of yet.
        shards_ahead: of all segments together, what worker processes read ahead of the training.
        """
        segments = min(self.parts, -(-self.parts // processes) * on_node)
        return (3 * self.block + math.ceil(shards_ahead / self.parts)) * segments

    @staticmethod
    def _in_a_row(first: np.ndarray, members: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The images shard after shard, int32 (N,), and where in that row each shard begins, int64 (S,)."""
        starts = np.searchsorted(members, first.astype(members.dtype))  # of another type, it would copy the members
        counts = np.diff(starts, append=len(members))
        shards = rng.permutation(np.flatnonzero(counts))
        counts, starts = counts[shards], starts[shards]
        begins = np.cumsum(counts) - counts
        row = np.empty(len(members), dtype=np.int32)
        for begin, start, count in zip(begins.tolist(), starts.tolist(), counts.tolist(), strict=True):
            row[begin : begin + count] = members[start : start + count]
        return row, begins
