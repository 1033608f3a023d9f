"""How a run stops before its end: signals, and on which iteration all processes act on them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from fastlt.run.context import RunContext
from fastlt.state import Batch

WAIT_S = 5.0  # after a signal, for a batch that does not come
SAME_S = 5.0  # a batch system signals every process, and the launcher passes it on: within this time it is one stop
POLL_S = 0.5


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, has saved a checkpoint, and can be resumed."""

    def __init__(self, signal: int, iteration: int, stage: str) -> None:
        super().__init__(f"stopped by signal {signal} at iteration {iteration} of {stage}")
        self.signal = signal


class WaitedInVain(BaseException):
    """A signal was received while the run waited for a batch, and the batch did not come."""


class Stopping:
    """Remembers a signal until the loop asks for it; only a wait for images is ended before."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.received, self._received_at = 0, 0.0
        self._waits_since: float | None = None
        self._in_vain = False
        self._left = threading.Event()

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM let the iteration finish; a second one stops at once.

        In another thread than the main one nothing changes: signals do not reach it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number, frame):
            if self._in_vain:  # sent by `_end_waits`
                self._in_vain = False
                if self._waits_since is not None:
                    raise WaitedInVain
                return
            peers = self.context.processes.peers
            if peers is not None and peers.noticed.is_set():
                return  # another process has failed, and the launcher ends the others
            if self.received:
                launched = self.context.reducer.world_size > 1
                if not launched or time.monotonic() - self._received_at > SAME_S:
                    self.end_at_once(number)
                return
            self.received, self._received_at = number, time.monotonic()
            self.context.say("stopping after this iteration; a checkpoint will be saved")
            threading.Thread(target=self._end_waits, daemon=True, name="end-waits").start()

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            self._left.set()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def end_at_once(self, number: int) -> NoReturn:
        """End the process as a kill does, without a wait for a thread; a checkpoint from before is there."""
        if self.context.main:
            text = f"\nfastlt: stopped at once by signal {number}; the same command goes on from the last checkpoint\n"
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), text.encode())  # `print` may be what the signal has interrupted
        os._exit(128 + number)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the run waits for images; a wait that lasts for `WAIT_S` after a signal ends in WaitedInVain."""
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def waited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, each waited for as in `waiting`."""
        while True:
            with self.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _end_waits(self) -> None:
        """The thread that looks for a wait without end after a signal."""
        while not self._left.wait(POLL_S):
            since = self._waits_since
            if since is None or time.monotonic() - since < WAIT_S:
                continue
            self._in_vain = True
            os.kill(os.getpid(), self.received)  # wakes the main thread up, which raises, if it still waits
            if not self._left.wait(WAIT_S) and self._in_vain:
                self.end_stuck_wait()

    def end_stuck_wait(self) -> None:
        """End the process from a thread of its own: the main one is in a library's call, which no signal ends."""
        self.context.say("stopped while waiting for images; the same command goes on from the last checkpoint")
        os._exit(128 + self.received)

    def agreed(self, save_is_due: bool, *, log_now: bool) -> tuple[int, bool]:
        """The signal that any process got (0: none), and whether one finds that a checkpoint is due.

        Signals reach processes at different moments, and their clocks differ; several of them agree, at log intervals
        only, so that all do the same in the same iteration. Waits for the device then.
        """
        reducer = self.context.reducer
        if reducer.world_size == 1:
            return self.received, save_is_due
        if not log_now:
            return 0, False
        answers = reducer.gather(torch.tensor([[self.received, save_is_due]], device=self.context.device))
        stop, due = answers.amax(0).tolist()
        return stop, bool(due)


class StoppingInside(Stopping):
    """In a program that is not ours, such as a notebook: nothing ends the process."""

    def end_at_once(self, number: int) -> NoReturn:
        raise KeyboardInterrupt(f"stopped at once by signal {number}")

    def end_stuck_wait(self) -> None:
        self.context.say("images are still waited for, in a call that cannot be interrupted")
