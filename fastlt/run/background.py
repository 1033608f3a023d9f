"""Checkpoints that are written while training goes on: from a copy, in their order, on a thread of its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlt.run import checkpoint

log = logging.getLogger(__name__)


class BackgroundSaves:
    """Saves states one after the other as `checkpoint.save` does; the caller waits for a copy of the state alone.

    There is one copy a path, whose memory the next one takes: a save to a path waits until the one before it is
    written. After an error nothing more is written, so that no file is newer than one that it needs. The error is
    raised by the next call.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._saves: dict[Path, Future[None]] = {}
        self._copies: dict[Path, dict[str, Any]] = {}
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
        self._copies[path] = on_host(state, self._copies.get(path))
        self._saves[path] = self._pool.submit(self._run, path, self._copies[path], keep, then)

    def finish(self) -> None:
        """Wait until everything is written. Raises the error of a save."""
        for save in self._saves.values():
            save.result()
        self._saves.clear()
        self._raise()

    def close(self) -> None:
        """Wait until everything is written, and end the thread. An error that nobody was told of is logged."""
        self._pool.shutdown()
        self._copies.clear()
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


def on_host(state: Any, held: Any = None) -> Any:
    """A copy of nested containers that shares no tensor with them; tensors are in memory, and waited for.

    held: an earlier copy, in whose tensors those of the same form are put. New memory costs a copy three times its
    time: 0.45 GB of Adam's state took 0.07 instead of 0.3 s.
    """
    copied = _copied(state, held)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


def _copied(value: Any, held: Any) -> Any:
    if isinstance(value, Tensor):
        if not isinstance(held, Tensor) or _form(held) != _form(value):
            held = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return held.copy_(value.detach(), non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its class, with what else it holds
        before = held if isinstance(held, dict) else {}
        copied.update({key: _copied(part, before.get(key)) for key, part in value.items()})
        return copied
    if isinstance(value, (list, tuple)):
        before = held if isinstance(held, (list, tuple)) and len(held) == len(value) else [None] * len(value)
        return type(value)(_copied(part, old) for part, old in zip(value, before, strict=True))
    return value


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype
