"""Work on many images by forked processes that are watched: none hangs, and none outlives the call."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback  # pyright: ignore[reportAttributeAccessIssue]  not in stubs
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

from loaders.cores import available_cores

CHUNK = 32  # images a task: few enough that the progress moves and the cores end together
AHEAD = 2  # chunks a process is handed at a time: the one it works on, and the next
STUCK_S = 300.0  # without an image from any process
POLL_S = 0.2
HELD = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
GRACE_S = 5.0  # for a process that was killed to be gone
Advance = Callable[[int], object]
Subject = TypeVar("Subject")
Result = TypeVar("Result")


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
) -> Generator[tuple[range, Result], None, None]:
    """(chunk, function(subject, chunk)) for each chunk as it is done, computed by forked processes.

    function: calls `image_done` for each image, so that chunks of any length show progress and are not taken for stuck.
    advance: called with the number of images done since the last call.
    Raises ValueError when a process dies or none finishes an image for `timeout_s`, whatever `function` raises
    otherwise; no process outlives the call.
    """
    done = shared_count()
    workers = [_Worker(function, subject, done) for _ in range(min(num_workers or available_cores(), len(chunks)))]
    waiting = iter(chunks)
    seen, changed = 0, time.monotonic()
    with _running(workers):
        # The workers first: a chunk that finds none left is not taken.
        for worker, chunk in zip(AHEAD * workers, waiting, strict=False):
            worker.hand(chunk)
        while busy := [worker for worker in workers if worker.chunks]:
            ready = wait([worker.connection for worker in busy], timeout=min(POLL_S, timeout_s))
            count = counted(done)
            if ready or count != seen:
                advance(count - seen)
                seen, changed = count, time.monotonic()
            elif time.monotonic() - changed > timeout_s:
                first = min(worker.chunks[0].start for worker in busy)
                raise ValueError(
                    f"no image was finished for {timeout_s:g} s, from number {first} on: is the disk "
                    "that holds them reachable?"
                )
            for worker in (worker for worker in busy if worker.connection in ready):
                answer = worker.answer()
                for chunk in islice(waiting, 1):
                    worker.hand(chunk)
                yield answer


def shared_count(value: int = 0) -> Synchronized:
    """A count in shared memory; ValueError when there is no room for its lock."""
    try:
        return multiprocessing.get_context("fork").Value("q", value)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError("shared memory, /dev/shm, is full: make it larger (docker run --shm-size=1g)") from None


class _Worker:
    """A process that is forked by `start`, and the chunks that it was handed and has not answered."""

    def __init__(self, *work: object) -> None:
        """work: what `_work` takes after its connection."""
        self.chunks: deque[range] = deque()
        self.process: BaseProcess | None = None
        self._work = work

    def start(self) -> None:
        context = multiprocessing.get_context("fork")  # so that the list of paths is shared and not copied
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *self._work), daemon=True)
        self.process.start()
        theirs.close()  # the connection ends with the process: no other one is forked with this end

    def end(self) -> None:
        if self.process is not None and self.process.pid is not None:  # else there was no room to fork it
            self.process.kill()
            self.connection.close()
            self.process.join(GRACE_S)

    def hand(self, chunk: range) -> None:
        self.chunks.append(chunk)
        try:
            self.connection.send(chunk)
        except BrokenPipeError:
            raise self._death() from None

    def answer(self) -> tuple[range, Any]:
        """The oldest chunk and its result; raises what the function raised, ValueError when the process is dead."""
        try:
            result, error = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None
        if error is not None:
            raise error
        return self.chunks.popleft(), result

    def _death(self) -> ValueError:
        assert self.process is not None
        self.process.join(GRACE_S)
        code = self.process.exitcode
        if code == -signal.SIGKILL:
            how = "was killed, most likely because memory ran out: use fewer processes (--workers)"
        else:
            how = f"died ({describe_exit(code)})"
        return ValueError(f"a process that decoded images {how}")


@contextmanager
def _running(workers: list[_Worker]) -> Iterator[None]:
    """Inside, the processes run; however it is left, they are killed."""
    try:
        with signals_held():
            for worker in workers:
                worker.start()
        yield
    finally:
        with signals_held():
            for worker in workers:
                worker.end()


@contextmanager
def signals_held() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGALRM wait; their handlers run afterwards.

    A handler that raises between a fork and its record would lose a process: nobody would end it or wait for it.
    """
    came: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():  # handlers run in no other
        of_python = {number: signal.getsignal(number) for number in HELD}
        before = {number: handler for number, handler in of_python.items() if handler is not None}
    try:
        for number in before:
            signal.signal(number, lambda number, frame: came.append(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def describe_exit(code: int | None) -> str:
    """How a process ended, from its exit code as multiprocessing tells it: -N after signal N."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    return f"signal {-code}, {name}"


# Of a worker process, set once when it is forked.
_done: Synchronized | None = None


def image_done() -> None:
    """Tell the process that waits for this one's chunk that one more image of it is done."""
    if _done is not None:
        with _done.get_lock():
            _done.value += 1


def counted(done: Synchronized) -> int:
    """The count, read without its lock: a process that is killed while it counts never gives that back."""
    return done.get_obj().value


def _work(connection: Connection, function: Callable, subject: object, done: Synchronized) -> None:
    """The process: answer each chunk with (result, None) or (None, the error), in order."""
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # and what the parent does when it is terminated is not for this one
    watch_parent()
    while True:
        chunk = connection.recv()
        try:
            answer = function(subject, chunk), None
        except Exception as error:
            answer = None, ExceptionWithTraceback(error, error.__traceback__)
        connection.send(answer)


def watch_parent() -> None:
    """End this process when the one that started it with `multiprocessing` is gone, however that ended."""
    threading.Thread(target=_wait_for_parent, daemon=True, name="watch-parent").start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"
    parent.join()
    os._exit(1)
