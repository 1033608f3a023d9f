"""Signals that end a command, as exceptions that are not lost."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

AGAIN_S = 0.05  # after which a signal's exception that Python dropped is raised again


class Terminated(BaseException):
    """Somebody, a batch system for one, has asked this process to end."""


def _terminated(number: int, frame: object) -> NoReturn:
    raise Terminated


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGTERM raises Terminated, as Ctrl-C raises KeyboardInterrupt, and neither is lost.

    Python drops what is raised while it runs a finaliser or a hook of fork: it is raised once more a moment later.
    """
    dropped: list[type[BaseException]] = []
    report = sys.unraisablehook

    def keep(unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, Terminated | KeyboardInterrupt):
            dropped.append(unraisable.exc_type)
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
        else:
            report(unraisable)

    def again(number: int, frame: object) -> NoReturn:
        raise dropped[-1]

    before = {
        number: signal.signal(number, to) for number, to in ((signal.SIGTERM, _terminated), (signal.SIGALRM, again))
    }
    sys.unraisablehook = keep
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = report
        for number, handler in before.items():
            signal.signal(number, handler)
