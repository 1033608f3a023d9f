"""Common to the backends that decode on the host: beginning and ending an epoch, and the copy to the device."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Generator, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from fastlt.state import Batch, upload
from loaders.order.plan import Boxes
from loaders.readers.base_loader import BaseLoader

STALL_S = 600.0  # a reader that delivers nothing for this long is taken to be stuck


class HostLoader(BaseLoader):
    """A BatchLoader whose subclass reads batches into host memory; this class labels, uploads and ends them."""

    _running: Generator[Batch, None, None] | None = None
    _closed = False

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See BatchLoader; reading begins with the first batch that is asked for."""
        assert not self._closed, "the loader is closed"
        self._end_epoch()
        index, boxes = self.plan.index(epoch, first_batch), self.plan.boxes(epoch, first_batch)
        self._running = self._batches(index, boxes)
        return self._running

    def close(self) -> None:
        """Ends the running epoch and every worker."""
        self._end_epoch()
        self._closed = True

    def _read(self, index: np.ndarray, boxes: Boxes) -> Generator[Tensor, None, None]:
        """Yields each batch's images uint8 (N, H, W, 3) in host memory that nobody writes to again."""
        raise NotImplementedError

    def _batches(self, index: np.ndarray, boxes: Boxes) -> Generator[Batch, None, None]:
        with contextlib.closing(self._read(index, boxes)) as read:
            yield from self._labelled(upload_ahead(read, self.device), index)

    def _labelled(self, images: Iterable[Tensor], index: np.ndarray) -> Iterator[Batch]:
        """The epoch's batches: `images` (N, H, W, 3) on the device, with what else belongs to each.

        Positions and labels go to the device once an epoch: at 32 pixels three copies a batch would be felt.
        """
        places = upload(torch.from_numpy(index), self.device)
        labels = self._labels.index_select(0, places)
        parts = places.split(self.batch_size), labels.split(self.batch_size)
        batches = zip(*parts, strict=True) if len(index) else ()  # nothing would be split into one empty batch
        for of_batch, (where, label) in zip(images, batches, strict=True):
            yield Batch(images=of_batch.permute(0, 3, 1, 2), labels=label, index=where)

    def _end_epoch(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None


def upload_ahead(host: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Images in host memory, on `device`.

    On CUDA one batch is copied ahead on a side stream from pinned memory; nothing waits on the host.
    """
    if device.type != "cuda":
        yield from host
        return
    stream = _copy_stream(device)
    ahead = None
    for images in host:
        with torch.cuda.stream(stream):
            # Pinned blocks come from torch's caching allocator, which keeps them until the copy has run.
            copy = upload(images, device)
            copied = torch.cuda.Event()
            stream.record_event(copied)
        if ahead is not None:
            yield _handed_over(*ahead)
        ahead = copy, copied
    if ahead is not None:
        yield _handed_over(*ahead)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all loaders and epochs: torch keeps the memory of batches that are gone for the stream they came by."""
    return torch.cuda.Stream(device)


def _handed_over(copy: Tensor, copied: torch.cuda.Event) -> Tensor:
    """The consumer's stream waits for the copy, and the memory lives until that stream is done with it."""
    current = torch.cuda.current_stream(copy.device)
    current.wait_event(copied)
    copy.record_stream(current)
    return copy
