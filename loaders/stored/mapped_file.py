"""Files that are read through memory, and a sentence when one of them cannot be read any more.

The system tells of that by SIGBUS, in the middle of whichever loop reads the memory: a file was cut short, or its disk
is gone. Left alone, the process would die without a word.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import mmap
import os
import resource
import signal
import threading
import weakref
from pathlib import Path

import numpy as np

# Every file that is mapped, and how long it was.
_mapped: weakref.WeakKeyDictionary[mmap.mmap, tuple[Path, int]] = weakref.WeakKeyDictionary()
_telling = threading.Lock()


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file, uint8 (n,), read-only; pages are read when they are touched.

    If one cannot be read then, the process says why and ends with exit code 2. ValueError for a file that may not be
    read at all.
    """
    try:
        mapped = _mapped_whole(path)
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        # A data set of thousands of shards: the limit that a process may set itself is far higher than the usual one.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        mapped = _mapped_whole(path)
    _mapped[mapped] = path.absolute(), len(mapped)
    _say_why_on_sigbus()
    return np.frombuffer(mapped, dtype=np.uint8)


def _mapped_whole(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def cut_short(below: Path = Path("/")) -> str | None:
    """The first mapped file at or below a path that is shorter than it was, as a sentence; None when none is."""
    for path, before in [*_mapped.values()]:
        if not path.is_relative_to(below.absolute()):
            continue
        try:
            now = path.stat().st_size
        except OSError:  # renamed or deleted: what was mapped is still there
            continue
        if now < before:
            return (
                f"{path} was cut short while it was read: it has {now:,} bytes and had {before:,}. Put the file back, "
                "or convert the data set again"
            )
    return None


@functools.cache
def _say_why_on_sigbus() -> None:
    # A handler of Python's `signal` would run after the loop, which never ends. This one is called inside of the loop.
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    library.signal(signal.SIGBUS, ctypes.cast(_on_sigbus, ctypes.c_void_p))


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_sigbus(number: int) -> None:
    _telling.acquire()  # and never released: several threads may come here at once, and one tells
    files = ", ".join(str(path) for path, _ in _mapped.values())
    why = cut_short() or f"one of {files} cannot be read any more: is its disk reachable?"
    os.write(2, f"\nfastlt: {why}\n".encode(errors="surrogateescape"))
    os._exit(2)
