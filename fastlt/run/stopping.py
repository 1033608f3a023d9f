"""How a run stops before its end: signals, and on which iteration all processes act on them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastlt.run.context import RunContext


class Interrupted(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, has saved a checkpoint, and can be resumed."""

    def __init__(self, signal: int, iteration: int, stage: str) -> None:
        super().__init__(f"stopped by signal {signal} at iteration {iteration} of {stage}")
        self.signal = signal


class Stopping:
    """Remembers a signal until the loop asks for it."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.received = 0

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM let the iteration finish; a second one stops at once."""

        def stop(number, frame):
            if self.received:
                raise KeyboardInterrupt
            self.received = number
            self.context.say("stopping after this iteration; a checkpoint will be saved")

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

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
