"""Keep freed memory in the process, so that the next iteration does not fault every page in again."""

from __future__ import annotations

import ctypes
import platform

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to take large blocks from the heap and never to give the heap's end back to the system.

    Activations are blocks of megabytes. By default each is mapped when it is allocated and unmapped when it is freed,
    and the kernel fills every page with zeros again. Kept, they are reused: a meta-step of ResNet-32 took 11 % less CPU
    time, a plain step 1 %, since its smaller heap was reused before. The peak of the process rose by 2 %.

    Changes the process for good. Returns whether it was done: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
