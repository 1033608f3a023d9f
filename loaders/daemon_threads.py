"""Work in daemon threads, with a future for each piece: unlike an executor's, a stuck one does not keep Python."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

STOP_S = 30.0  # longer than any piece of work takes
T = TypeVar("T")


def in_background(function: Callable[..., T], *arguments: object, name: str) -> Future[T]:
    """What `function` returns or raises, from a thread of its own."""
    future: Future[T] = Future()
    threading.Thread(target=_fulfil, args=(future, function, arguments), daemon=True, name=name).start()
    return future


class DaemonThreads:
    """Threads that run what is submitted, in order."""

    def __init__(self, count: int, name: str) -> None:
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True, name=name) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """What `function` returns or raises; one that has not begun can be cancelled."""
        future: Future[T] = Future()
        self._tasks.put((future, function, arguments))
        return future

    def end(self) -> None:
        """Ends each thread after what it is doing; may be called twice."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(STOP_S)
        self._threads = []

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            _fulfil(*task)


def _fulfil(future: Future, function: Callable[..., Any], arguments: tuple) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # whatever it is, who waits for the result must hear of it
            future.set_exception(error)
