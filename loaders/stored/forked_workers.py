"""Work on many images by forked processes that are watched: none hangs, and none outlives the call."""

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
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from typing import TypeVar

CHUNK = 32  # images a task: few enough that the progress moves and the cores end together
STUCK_S = 300.0  # without an image from any process
POLL_S = 0.2
Advance = Callable[[int], object]
Subject = TypeVar("Subject")
Result = TypeVar("Result")


def available_cores() -> int:
    """Cores this process may use, at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks_of(count: int) -> list[range]:
    """The numbers of `count` images, CHUNK at a time."""
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def map_chunks(
    function: Callable[[Subject, range], Result],
    subject: Subject,
    chunks: list[range],
    *,
    num_workers: int | None = None,
    advance: Advance = lambda n: None,
    timeout_s: float = STUCK_S,
) -> Iterator[tuple[range, Result]]:
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
                "a process that decoded images was killed, most likely because memory ran out: use fewer processes "
                "(--workers)"
            ) from None


@contextmanager
def _pool(
    workers: int, function: Callable, subject: object
) -> Iterator[tuple[ProcessPoolExecutor, Event, Synchronized]]:
    """The processes, the event that ends them at any point when it is set, and the number of images they have done."""
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
