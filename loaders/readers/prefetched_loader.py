"""Fetching the shards of an epoch ahead of the loader that reads them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Generator, Iterator
from io import BufferedReader

import numpy as np
from tqdm import tqdm

from fastlt.state import Batch
from loaders.order.plan import EpochPlan
from loaders.protocol import BatchLoader
from loaders.stored.cached_folder import FETCHERS
from loaders.stored.streamed import StreamedShards

PAUSE_S = 1.0  # after a shard that could not be fetched
SLOW_S = 10.0  # without a batch, after which the user is told what is waited for


class PrefetchedLoader:
    """A BatchLoader whose shards are in the cache before its reader comes to them, and until it is past them.

    loader: over `shards` by `plan`; it fetches by itself what is not there in time. Takes it over: `close` closes it.
    ahead: the most shards that are kept for it, unless a batch needs more.
    asked: shards of the epochs so far, for the share of hits.
    """

    def __init__(self, loader: BatchLoader, shards: StreamedShards, plan: EpochPlan, ahead: int) -> None:
        self.loader, self.shards, self.plan, self.ahead = loader, shards, plan, ahead
        self.backend, self.reason, self.crops = loader.backend, loader.reason, loader.crops
        self.batch_size, self.num_samples = loader.batch_size, loader.num_samples
        self.asked = 0
        self._fetching: _Fetching | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See BatchLoader; shards are fetched from now on."""
        self._end_epoch()
        batches = self.loader.epoch(epoch, first_batch)
        index = self.plan.index(epoch, first_batch)
        self._fetching = _Fetching(self.shards, index, self.batch_size, self.ahead)
        self.asked += len(self._fetching.queue)
        return self._batches(batches, self._fetching)

    def close(self) -> None:
        """Ends the fetching, and closes the loader."""
        self._end_epoch()
        self.loader.close()

    def _end_epoch(self) -> None:
        if self._fetching is not None:
            self._fetching.close()
            self._fetching = None

    @staticmethod
    def _batches(batches: Iterator[Batch], fetching: _Fetching) -> Generator[Batch, None, None]:
        try:
            while True:
                fetching.waiting_since = time.monotonic()
                batch = next(batches, None)
                fetching.waiting_since = None
                if batch is None:
                    return
                yield batch
                fetching.one_more_read()
        finally:
            fetching.close()


class _Fetching:
    """Threads that walk through the shards of an epoch, in the order in which they are needed first.

    index: int64 (n,), the images of the epoch in order. A shard is held from when it is fetched until the last batch
    with an image of it has been handed out. At most `room` are held: `ahead`, or what one batch needs.
    What cannot be fetched is left to the reader, which meets the same error when it needs the shard.
    """

    def __init__(self, shards: StreamedShards, index: np.ndarray, batch_size: int, ahead: int) -> None:
        self._shards = shards
        numbers, first, last = _uses(shards.shard_of[index], batch_size)
        order = np.argsort(first, kind="stable")
        self.queue = [(int(numbers[k]), int(last[k])) for k in order]
        self.room = max(ahead, _most_at_once(first, last))
        self.waiting_since: float | None = None
        self._next, self._read = 0, 0
        self._held: dict[int, tuple[int, BufferedReader | None]] = {}  # by shard: its last batch, the file when it came
        self._changed, self._closing = threading.Condition(), threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True, name="prefetch")
            for work in (*[self._work] * min(FETCHERS, len(self.queue)), self._tell)
        ]
        for thread in self._threads:
            thread.start()

    def one_more_read(self) -> None:
        """The reader is done with another batch."""
        with self._changed:
            self._read += 1
            past = [number for number, (last, file) in self._held.items() if last < self._read and file is not None]
            for number in past:
                self._let_go(number)

    def close(self) -> None:
        """Fetch nothing more; what is under way is finished by its thread."""
        self._closing.set()
        self._let_all_go()

    def _let_all_go(self) -> None:
        with self._changed:
            for number in [number for number, (_, file) in self._held.items() if file is not None]:
                self._let_go(number)
            self._changed.notify_all()

    def _let_go(self, number: int) -> None:
        """Under the lock."""
        _, file = self._held.pop(number)
        if file is not None:
            file.close()
        self._changed.notify_all()

    def _work(self) -> None:
        while (task := self._take()) is not None:
            number, last = task
            try:
                file = self._shards.files.hold(self._shards.name(number), wait=False)
            except ValueError:  # all errors of `hold`
                file = None
            with self._changed:
                self._held[number] = last, file
                if file is None or self._closing.is_set() or last < self._read:
                    self._let_go(number)
            if file is None:
                self._closing.wait(PAUSE_S)

    def _take(self) -> tuple[int, int] | None:
        """The next shard to fetch, when there is room for it; None when there is none any more."""
        with self._changed:
            while not self._closing.is_set() and self._next < len(self.queue):
                if len(self._held) < self.room:
                    number, last = self.queue[self._next]
                    self._next += 1
                    self._held[number] = last, None
                    return number, last
                self._changed.wait()
        return None

    def _tell(self) -> None:
        told = False
        while not self._closing.wait(1.0):
            since = self.waiting_since
            slow = since is not None and time.monotonic() - since > SLOW_S
            if slow and not told:
                url = self._shards.files.remote.url
                tqdm.write(f"fastlt: still waiting for shards of {url}", file=sys.stderr)
                self._let_all_go()  # the reader may be waiting for their room
            told = slow


def _uses(shard_of: np.ndarray, batch_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The shards of an epoch, each with its first and its last batch: int64 (S,) each.

    shard_of: int64 (n,), the shard of each image in order.
    """
    numbers, first = np.unique(shard_of, return_index=True)
    _, from_end = np.unique(shard_of[::-1], return_index=True)
    return numbers, first // batch_size, (len(shard_of) - 1 - from_end) // batch_size


def _most_at_once(first: np.ndarray, last: np.ndarray) -> int:
    """The most shards that are in use in one batch; first, last: int64 (S,), of each."""
    if not len(first):
        return 0
    change = np.zeros(last.max() + 2, dtype=np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    return int(change.cumsum().max())
