"""Decoding every image once before a conversion: what is bad is known by path, and how big each one is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event

import numpy as np

from loaders.sources.split import ArraySplit, Split

CHUNK = 32  # images a task: few enough that the progress moves and the cores end together
MAX_SIDE = 65535  # FFCV stores width and height in 16 bits
STUCK_S = 300.0  # without an image from any process
POLL_S = 0.2
Advance = Callable[[int], None]


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be converted: its index in the split, its path, and why."""

    index: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class ImageCheck:
    """What decoding every image of a split has shown.

    sizes: int64 (N, 2), (height, width); (0, 0) where the image is bad.
    """

    sizes: np.ndarray
    bad: tuple[BadImage, ...]

    @property
    def good(self) -> np.ndarray:
        """Indices of the images that can be converted, int64."""
        return np.setdiff1d(np.arange(len(self.sizes)), [image.index for image in self.bad])


def available_cores() -> int:
    """Cores this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_images(
    split: Split,
    *,
    num_workers: int | None = None,
    advance: Advance = lambda n: None,
    timeout_s: float = STUCK_S,
) -> ImageCheck:
    """Decode every image of `split` on all cores; images in memory need no decoding.

    num_workers: processes, None for one a core.
    advance: called with the number of images done since the last call.
    timeout_s: processes that finish no image for so long are ended.
    Raises ValueError when a decoding process dies (out of memory, most likely) or all are stuck.
    """
    if isinstance(split, ArraySplit):
        advance(len(split))
        return ImageCheck(np.tile(np.array(split.image_size, dtype=np.int64), (len(split), 1)), ())
    sizes = np.zeros((len(split), 2), dtype=np.int64)
    bad: list[BadImage] = []
    chunks = [range(start, min(start + CHUNK, len(split))) for start in range(0, len(split), CHUNK)]
    checked = map_chunks(_check_chunk, split, chunks, num_workers=num_workers, advance=advance, timeout_s=timeout_s)
    for chunk, results in checked:
        for i, (size, reason) in zip(chunk, results, strict=True):
            sizes[i] = size
            if reason is not None:
                bad.append(BadImage(i, split.name(i), reason))
    return ImageCheck(sizes, tuple(sorted(bad, key=lambda image: image.index)))


def map_chunks(
    function: Callable,
    subject: object,
    chunks: list[range],
    *,
    num_workers: int | None = None,
    advance: Advance = lambda n: None,
    timeout_s: float = STUCK_S,
) -> Iterator[tuple[range, object]]:
    """(chunk, function(subject, chunk)) for each chunk as it is done, computed by forked processes.

    function: calls `image_done` for each image, so that chunks of any length show progress and are not taken for stuck.
    advance: called with the number of images done since the last call.
    Raises ValueError when a process dies or none finishes an image for `timeout_s`, whatever `function` raises
    otherwise; no process outlives the call.
    """
    workers = min(num_workers or available_cores(), len(chunks))
    if not workers:
        return
    # Forked, so that the list of paths is shared and not copied to each process.
    with _pool(workers, function, subject) as (pool, abort, done):
        waiting = iter(chunks)
        running = {}
        seen, changed = 0, time.monotonic()
        try:
            while True:
                # A few tasks ahead of the workers, not all: the queue of a million images would be memory for nothing.
                for chunk in _take(waiting, 4 * workers - len(running)):
                    running[pool.submit(_run, chunk)] = chunk
                if not running:
                    return
                finished = wait(running, timeout=min(POLL_S, timeout_s), return_when=FIRST_COMPLETED).done
                count = counted(done)
                if finished or count != seen:
                    advance(count - seen)
                    seen, changed = count, time.monotonic()
                elif time.monotonic() - changed > timeout_s:
                    abort.set()
                    first = min(chunk.start for chunk in running.values())
                    raise ValueError(
                        f"no image was finished for {timeout_s:g} s, from number {first} of the split on: is the disk "
                        "that holds them reachable?"
                    )
                for future in finished:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a process that decoded images was killed, most likely because memory ran out: use fewer (--workers)"
            ) from None


@contextmanager
def _pool(
    workers: int, function: Callable, subject: object
) -> Iterator[tuple[ProcessPoolExecutor, Event, Synchronized]]:
    """The processes, what ends them whatever they are doing when it is set, and the number of images they have done."""
    context = multiprocessing.get_context("fork")
    abort, done = context.Event(), context.Value("q", 0)
    arguments = (function, subject, os.getpid(), abort, done)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=arguments)
    try:
        yield pool, abort, done
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


# Of a worker process, set once when it is forked.
_task: tuple[Callable, object] | None = None
_done: Synchronized | None = None


def image_done() -> None:
    """Tell the process that waits for this one's chunk that one more image of it is done."""
    if _done is not None:
        with _done.get_lock():
            _done.value += 1


def counted(done: Synchronized) -> int:
    """The count, read without its lock: a process that is killed while it counts never gives that back."""
    return done.get_obj().value


def _start(function: Callable, subject: object, parent: int, abort: Event, done: Synchronized) -> None:
    global _task, _done
    _task, _done = (function, subject), done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and what the parent does when it is terminated is not for this one
    threading.Thread(target=_end_with, args=(parent, abort), daemon=True).start()


def _end_with(parent: int, abort: Event) -> None:
    """End this process when its parent says so or is gone; it would wait for ever, and keep the parent's lock."""
    while os.getppid() == parent and not abort.wait(0.3):
        pass
    os._exit(1)


def _run(chunk: range) -> object:
    assert _task is not None
    function, subject = _task
    return function(subject, chunk)


def _take(items: Iterator[range], count: int) -> Iterable[range]:
    for _, item in zip(range(count), items, strict=False):
        yield item


def _check_chunk(split: Split, chunk: range) -> list[tuple[tuple[int, int], str | None]]:
    results = []
    for i in chunk:
        results.append(_check(split, i))
        image_done()
    return results


def _check(split: Split, i: int) -> tuple[tuple[int, int], str | None]:
    """((height, width), None), or ((0, 0), why it cannot be converted)."""
    try:
        height, width = split.image(i).shape[:2]
    except ValueError as error:
        return (0, 0), str(error)
    if max(height, width) > MAX_SIDE:
        return (0, 0), f"{width}x{height}: no side may be longer than {MAX_SIDE}"
    return (height, width), None
