"""Two crops of every image, for methods that compare two views: two readers of one order, side by side."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from dataclasses import replace

from fastlt.state import Batch
from loaders.protocol import BatchLoader


class TwoViewLoader:
    """A BatchLoader whose batches are `first`'s, with `second`'s images of the same index as `second_crop`.

    first, second: made by `make_loader` with the same arguments but another `view`. Each image is decoded twice. Takes
    both over: `close` closes them.
    """

    crops = True

    def __init__(self, first: BatchLoader, second: BatchLoader) -> None:
        assert first.crops, "whole images hold both crops already"
        assert len(first) == len(second), (len(first), len(second))
        self.first, self.second = first, second
        self.backend, self.reason = first.backend, f"{first.reason}; two crops of every image"
        self.batch_size, self.num_samples = first.batch_size, first.num_samples

    def __len__(self) -> int:
        return len(self.first)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See BatchLoader."""
        return self._batches(self.first.epoch(epoch, first_batch), self.second.epoch(epoch, first_batch))

    def close(self) -> None:
        """Closes both readers."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.second.close)
            stack.callback(self.first.close)

    @staticmethod
    def _batches(first: Iterator[Batch], second: Iterator[Batch]) -> Generator[Batch, None, None]:
        for one, other in zip(first, second, strict=True):
            yield replace(one, second_crop=other.images)
