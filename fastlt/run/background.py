"""Checkpoints that are written while training goes on: from a copy, in their order, on a thread of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fastlt.run import checkpoint

log = logging.getLogger(__name__)


class BackgroundSaves:
    """Saves states one after the other as `checkpoint.save` does; the caller waits for a copy of the state alone.

    One copy a path at most: the next save to a path waits until the one before it is written. After an error nothing
    more is written, so that no file is newer than one that it needs. The error is raised by the next call.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._saves: dict[Path, Future[None]] = {}
        self._error: Exception | None = None
        self._told = False

    @property
    def failed(self) -> bool:
        """Whether a save ended in an error that has not been raised."""
        return self._error is not None and not self._told

    def save(self, path: Path, state: dict[str, Any], *, keep: int, then: Callable[[], object] | None = None) -> None:
        """Copy a state and let it be saved; waits for the device, and for an earlier save to `path`.

        then: called when it is written. Raises the error of an earlier save.
        """
        if path in self._saves:
            self._saves[path].result()
        self._raise()
        self._saves[path] = self._pool.submit(self._run, path, on_host(state), keep, then)

    def finish(self) -> None:
        """Wait until everything is written. Raises the error of a save."""
        for save in self._saves.values():
            save.result()
        self._saves.clear()
        self._raise()

    def close(self) -> None:
        """Wait until everything is written, and end the thread. An error that nobody was told of is logged."""
        self._pool.shutdown()
        if self.failed:
            log.error("%s", self._error)

    def _run(self, path: Path, state: dict[str, Any], keep: int, then: Callable[[], object] | None) -> None:
        if self._error is not None:
            return
        try:
            checkpoint.save(path, state, keep=keep)
            if then is not None:
                then()
        except Exception as error:
            self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            self._told = True
            raise self._error


def on_host(state: Any) -> Any:
    """A copy of nested containers that shares no tensor with them; tensors are in memory, and waited for."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # of its class, with what else it holds
        copied.update({key: on_host(value) for key, value in state.items()})
        return copied
    if isinstance(state, (list, tuple)):
        return type(state)(on_host(value) for value in state)
    return state
