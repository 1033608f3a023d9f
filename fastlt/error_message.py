"""The message with which training ends, printed once by the processes of one launch."""

from __future__ import annotations

import fcntl
import os
import sys

# Environment variable: the file in which the processes of `fastlt launch` record the messages that they printed.
PRINTED = "FASTLT_PRINTED"


def print_error(error: Exception) -> None:
    """Print an error for the user on stderr, unless another process of the same launch has printed the same."""
    message = f"fastlt: {error}\n"
    path = os.environ.get(PRINTED)
    if path is None:
        print(message, end="", file=sys.stderr)
        return
    with open(path, "a+", encoding="utf-8", errors="backslashreplace") as printed:
        # The second waits until the first has printed: the launcher ends all processes when one has ended.
        fcntl.flock(printed, fcntl.LOCK_EX)
        printed.seek(0)
        if message not in printed.read():
            print(message, end="", file=sys.stderr, flush=True)
            printed.write(message)
