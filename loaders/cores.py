"""How many cores there are to work on."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores this process may use, at least 1."""
    return len(os.sched_getaffinity(0))
