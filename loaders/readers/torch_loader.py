"""The plain reference backend: a torch DataLoader whose workers read the stored images one by one."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Generator, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from loaders.order.plan import Boxes, EpochPlan
from loaders.protocol import StoredSplit
from loaders.readers.base_loader import WORKER_BATCHES
from loaders.readers.fork_server import fork_server, remove_segments
from loaders.readers.host_loader import STALL_S, HostLoader
from loaders.readers.worker_watch import WorkerWatch, shared_memory_error, shared_memory_free
from loaders.stored.damage import DamageError, NoRoomError, ReaderError
from loaders.stored.ffcv_kernels import resize_crop
from loaders.stored.forked_workers import watch_parent

LOCK_BYTES = 64 << 10  # of shared memory, more than the locks of a worker's queues take
# What the workers' common ancestor imports, so that none of them has to.
PRELOADED = ["loaders.readers.torch_loader", "ffcv.libffcv"]


def _clean_ancestor() -> BaseContext:
    """Starts workers as children of a process that has decoded nothing, and none of whose threads ends.

    Children of this one could wait for ever for a lock of OpenCV's, which a thread that was just ending (another
    loader's, say) held when they were forked.
    """
    return fork_server(PRELOADED)


def _begin(number: int) -> None:
    """Make worker `number` end with the process that it works for, not before it, and leave its faults to that one."""
    watch_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the run still needs a batch
    signal.signal(signal.SIGBUS, signal.SIG_DFL)  # told by `WorkerWatch`


class _CroppedBatches(Dataset):
    """Asked with (index int64 (N,), boxes int32 (N, 4)), it answers with that batch's pixels."""

    def __init__(self, stored: StoredSplit, shape: tuple[int, int]) -> None:
        self.stored, self.shape = stored, shape

    def __getitem__(self, asked: tuple[np.ndarray, np.ndarray]) -> Tensor | DamageError | ReaderError | NoRoomError:
        """Errors are answers: raised, they would reach the user with the worker's traceback for a message."""
        index, boxes = asked
        pixels = np.empty((len(index), *self.shape, 3), dtype=np.uint8)
        try:
            for i, box, out in zip(index, boxes, pixels, strict=True):
                resize_crop(self.stored.image(i), box, out)
        except (DamageError, ReaderError, NoRoomError) as error:
            return error
        images, worker = torch.from_numpy(pixels), get_worker_info()
        if worker is None:
            return images
        try:
            # Here and not by the thread that sends it, whose error nobody would hear of.
            return images.share_memory_()
        except RuntimeError:
            remove_segments([os.getpid()])
            return shared_memory_error(self.stored.path, worker.num_workers)


class _PlannedSampler(Sampler):
    """Hands out the current epoch's batches, which the loader sets before each epoch."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.index, self.boxes = np.empty(0, np.int64), Boxes(0, lambda start, stop: np.empty((0, 4), np.int32))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, len(self.index), self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield self.index[batch], self.boxes[batch]

    def __len__(self) -> int:
        return -(-len(self.index) // self.batch_size)


class TorchLoader(HostLoader):
    """BatchLoader over torch.utils.data.DataLoader worker processes.

    num_workers: processes, which import the main module: a script needs its `if __name__ == "__main__"`. 0 reads in
        this process; None takes all cores that it may use.
    A damaged image raises DamageError naming it. A worker that died, was stopped, found no room in shared memory or was
    silent for ten minutes raises ReaderError, the first three within ten seconds. Workers end with this process.
    """

    backend = "torch"
    workers_advice = "0 reads in the main process, a positive number starts as many workers"

    def __init__(
        self, stored: StoredSplit, plan: EpochPlan, device: torch.device | str, num_workers: int | None = None
    ) -> None:
        super().__init__(plan, device, num_workers)
        self._path = stored.path
        self._watch: WorkerWatch | None = None
        self._sampler = _PlannedSampler(plan.batch_size)
        self._loader: DataLoader | None = DataLoader(
            _CroppedBatches(stored, plan.output_shape),
            sampler=self._sampler,
            batch_size=None,  # the sampler's items are whole batches already
            num_workers=self.workers,
            prefetch_factor=WORKER_BATCHES if self.workers else None,
            multiprocessing_context=_clean_ancestor() if self.workers else None,
            persistent_workers=self.workers > 0,
            worker_init_fn=_begin,
            pin_memory=self.device.type == "cuda",  # by a thread, which the copy to the GPU then need not wait for
            # Its own generator: by default each epoch draws a worker seed from, and so advances, torch's global one.
            generator=torch.Generator(),
        )

    def _read(self, index: np.ndarray, boxes: Boxes) -> Generator[Tensor, None, None]:
        assert self._loader is not None, "the loader is closed"
        self._sampler.index, self._sampler.boxes = index, boxes
        if self._watch is None and shared_memory_free() < LOCK_BYTES * self.workers:
            # Asked beforehand: an iterator that torch cannot finish making prints a traceback of its own.
            raise shared_memory_error(self._path, self.workers)
        with self._waiting():
            batches = iter(self._loader)
        if self._watch is None and self.workers:
            processes = batches._workers  # pyright: ignore[reportAttributeAccessIssue]  of the iterator with workers
            self._watch = WorkerWatch(self._path, processes, STALL_S)
            # At the exit of this process, after it has ended what is left of them.
            Finalize(None, remove_segments, args=([process.pid for process in processes],), exitpriority=-1)
        while True:
            with self._waiting():
                images = next(batches, None)
            if images is None:
                return
            if isinstance(images, Exception):
                raise images
            yield images

    def _waiting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._watch is None else self._watch.waiting()

    def close(self) -> None:
        """Ends the running epoch and the worker processes."""
        super().close()
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        self._loader = None  # the DataLoader joins its workers when its last reference goes
