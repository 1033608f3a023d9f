"""Reading FFCV files with FFCV's two C kernels, in our order and with our crops, on threads of this process.

FFCV's own Loader is not used. It draws crops from generators that no seed reaches, hands out buffers that it writes to
again, waits for all threads after every batch, goes on silently when its thread dies, sets torch's thread count, and
lets two loaders at once abort the process under one of numba's threading layers. Here plain threads call one compiled
loop, which does not hold the interpreter's lock, over a few images each, into memory that belongs to the batch. Several
small batches are decoded in one go: at 32 pixels, Python's part of a batch takes longer than its pixels.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from loaders.daemon_threads import DaemonThreads
from loaders.order.plan import Boxes, EpochPlan
from loaders.readers.host_loader import STALL_S, HostLoader
from loaders.stored.beton import Beton
from loaders.stored.damage import DamageError, ReaderError
from loaders.stored.ffcv_kernels import NONE_DAMAGED, decoding_loop

BUFFER_BYTES = 4 << 20  # decoded in one go: as many whole batches as this holds, at least one
PIECE_BYTES = 1 << 20  # what a thread decodes at a time, at most, and at least one image
BUFFERS_AHEAD = 3  # decoded while the consumer works; more when the threads need more to be busy


class FfcvLoader(HostLoader):
    """BatchLoader over a .beton file, read through the operating system's page cache.

    num_workers: decoding threads; None takes all cores that it may use.
    The first batch of a process waits some seconds for numba to compile the decoder.
    A damaged image raises DamageError naming it; an exception in a thread and a decoder silent for ten minutes raise
    RuntimeError naming the file.
    """

    backend = "ffcv"

    def __init__(
        self, stored: Beton, plan: EpochPlan, device: torch.device | str, num_workers: int | None = None
    ) -> None:
        super().__init__(plan, device, num_workers)
        self.stored = stored
        image_bytes = 3 * int(np.prod(plan.output_shape))
        self._buffer = plan.batch_size * max(1, BUFFER_BYTES // (image_bytes * plan.batch_size))
        self._piece = max(1, min(PIECE_BYTES // image_bytes, -(-self._buffer // self.workers)))
        pieces = -(-self._buffer // self._piece)
        self._ahead = max(BUFFERS_AHEAD, -(-2 * self.workers // pieces))
        self._scratch = threading.local()
        self._threads = DaemonThreads(self.workers, "ffcv-decode")

    def close(self) -> None:
        """Ends the running epoch and the threads; a stuck one is left behind (it is a daemon)."""
        super().close()
        self._threads.end()

    def _read(self, index: np.ndarray, boxes: Boxes) -> Generator[Tensor, None, None]:
        starts = iter(range(0, len(index), self._buffer))
        waiting: deque[tuple[Tensor, list[Future]]] = deque()
        try:
            while True:
                for start in islice(starts, self._ahead - len(waiting)):
                    end = start + self._buffer
                    waiting.append(self._submit(index[start:end], boxes[start:end]))
                if not waiting:
                    return
                images, pieces = waiting[0]
                for piece in pieces:
                    self._finish(piece)
                waiting.popleft()
                yield from images.split(self.batch_size)
        finally:
            for _, pieces in waiting:
                for piece in pieces:
                    piece.cancel()

    def _submit(self, index: np.ndarray, boxes: np.ndarray) -> tuple[Tensor, list[Future]]:
        """Memory for the images at `index`, and what fills it, piece by piece."""
        shape = (len(index), *self.plan.output_shape, 3)
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        pixels = images.numpy()
        pieces = []
        for start in range(0, len(index), self._piece):
            part = slice(start, start + self._piece)
            pieces.append(self._threads.submit(self._decode, index[part], boxes[part], pixels[part]))
        return images, pieces

    def _decode(self, index: np.ndarray, boxes: np.ndarray, images: np.ndarray) -> None:
        """Fill `images`, in one of the threads."""
        split, scratch = self.stored, getattr(self._scratch, "bytes", None)
        if scratch is None:
            scratch = self._scratch.bytes = np.empty(3 * int((split.heights * split.widths).max()), dtype=np.uint8)
        stored = (split.storage, split.offsets, split.sizes, split.is_jpeg, split.heights, split.widths)
        damaged = decoding_loop()(*stored, index, boxes, images, scratch)
        if damaged != NONE_DAMAGED:
            split.image(index[damaged])  # says what is wrong with it

    def _finish(self, piece: Future) -> None:
        try:
            piece.result(timeout=STALL_S)
        except FutureTimeout:
            raise ReaderError(
                f"{self.stored.path}: no batch for {STALL_S:.0f} s; is the disk reachable? "
                "The 'torch' backend reads it without FFCV's kernels"
            ) from None
        except DamageError as damage:
            raise DamageError(str(damage)) from damage  # in this thread, with its own traceback
        except Exception as error:
            raise ReaderError(
                f"{self.stored.path}: a decoding thread stopped with {type(error).__name__}: {error}; "
                "the 'torch' backend reads the same file in other processes"
            ) from error
