"""Locks on files, between processes: of one process alone, or shared by several.

The kernel holds them (flock) and releases them when the process ends, however it ends. They hold between hosts too,
where the shared file system takes part, as NFS from version 4 on does. On a file system without locks a warning says
that nothing is locked.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

# Seconds that a lock is waited for: the processes of a killed owner may need them to end.
PATIENCE_S = 3.0
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def take(descriptor: int, path: Path, *, wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file; False when another process has it locked and `wait` is not set.

    path: of the file, for the warning on a file system without locks; True is returned there.
    shared: others may have it locked in the same way.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        log.warning("%s: its file system has no locks; do not let two processes write to %s", path, path.parent)
    return True


def open_locked(path: Path, patience_s: float = PATIENCE_S) -> int | None:
    """The descriptor of a file that is locked, made with its folder where absent; None when another process keeps it.

    Closing the descriptor releases the lock. The owner may remove the file while it is locked. OSError when the file
    cannot be made.
    """
    deadline = time.monotonic() + patience_s
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        if take(descriptor, path) and is_at(descriptor, path):
            return descriptor
        os.close(descriptor)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)


@contextmanager
def locked(path: Path, patience_s: float) -> Iterator[bool]:
    """Inside, no other process or thread is inside for the same path, if True; False after `patience_s` seconds.

    path: of a file that is there meanwhile, and holds nothing. OSError when it cannot be made.
    """
    descriptor = open_locked(path, patience_s)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`: its owner may have removed it between opening and locking."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
