"""The OpenMP runtime that shares a CPU's work among cores: LLVM's where it is installed, else the one torch brings.

Torch's wheels bring GNU's. Its threads spin for milliseconds while they wait for each other, and do not give their
core to anybody: a second training on the same cores, or another loader's threads in this process, stop them for whole
slices of the scheduler. LLVM's offer their core at every turn of the wait. docs/speed.md has the figures.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

VARIABLE = "FASTLT_OPENMP"  # a library to load, or GNU to leave torch what it brings
GNU = "gnu"
# The environment's own (conda's llvm-openmp, pip's intel-openmp), then the system's (Debian's libomp5).
LIBRARIES = (f"{sys.prefix}/lib/libomp.so", f"{sys.prefix}/lib/libiomp5.so", "libomp.so.5", "libomp.so")
ADVISED_PACKAGE = "libomp5"


def load_llvm_openmp() -> None:
    """Make LLVM's OpenMP runtime that of this process, if it is installed; without effect once torch is loaded.

    It exports GNU's functions under GNU's names. Loaded first and for all, it is what torch, numba and OpenCV find.
    ValueError when FASTLT_OPENMP names a library that cannot be loaded.
    """
    asked = os.environ.get(VARIABLE)
    if asked == GNU or "torch" in sys.modules or runtime() != GNU:
        return
    why: Exception | None = None
    for library in LIBRARIES if asked is None else (asked,):
        try:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL).omp_get_max_threads()
        except (OSError, AttributeError) as error:
            why = error
        else:
            _remove_registration()
            os.register_at_fork(after_in_child=_remove_registration)
            return
    if asked is not None:
        raise ValueError(f"{VARIABLE} is {asked!r}, which cannot be loaded ({why}); name LLVM's libomp.so, or {GNU}")


def _remove_registration() -> None:
    """Remove the file by which LLVM's runtime would notice a second copy of itself in this process.

    It makes one when it starts and one in every fork. Killed processes and forks that end by `os._exit` leave theirs.
    """
    name = f"__KMP_REGISTERED_LIB_{os.getpid()}"
    for folder in ("/dev/shm", "/tmp"):
        for path in (f"{folder}/{name}_{os.getuid()}", f"{folder}/{name}"):
            with contextlib.suppress(OSError):
                os.unlink(path)


def runtime() -> str:
    """Whose OpenMP the libraries of this process use or would use: "llvm" or "gnu"."""
    return "llvm" if hasattr(ctypes.CDLL(None), "kmp_get_blocktime") else GNU


def why_neighbours_slow() -> str | None:
    """Why programs that now use the same cores slow this one down by more than their share, or None."""
    busy = os.getloadavg()[0] >= len(os.sched_getaffinity(0)) / 2
    if not busy or runtime() != GNU or os.environ.get(VARIABLE) == GNU:
        return None
    return (
        "other programs use these cores, and torch's threads wait by GNU's OpenMP, which does not give way to them: "
        f"both get much slower; install LLVM's (Debian's {ADVISED_PACKAGE}), or set {VARIABLE}={GNU} to keep GNU's"
    )
