"""Processes that do not outlive the one that started them, however that one ends."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
# Environment variable: the process number of `fastlt launch`, in the training processes that it starts.
LAUNCHER = "FASTLT_LAUNCHER"


def end_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Have Linux send this process a signal when its parent ends, also by SIGKILL.

    parent: its process id. It may have ended before this call: the signal is then sent here.
    Only the thread that started this process counts as its parent: call it in those that a main thread starts.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)
