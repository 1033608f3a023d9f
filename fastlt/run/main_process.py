"""Work that one process does for all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process; every process returns its result, or raises its ValueError.

    An OSError, as of a file that cannot be read or written, becomes a ValueError: it is a matter of the user's data.
    The other processes wait. What is returned has to be small: it is sent to all of them.
    """
    outcome: list = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except ValueError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = ValueError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1] from None
    return outcome[0]
