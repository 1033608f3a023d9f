"""The lock of a run folder: one process writes there, and a killed one leaves the folder free."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import socket
import time
from pathlib import Path

from fastlt import file_lock
from fastlt.run.folder import lock_file, unfinished_files

# The descriptors of the locks that this process holds, by the real path of the run folder.
_held: dict[Path, int] = {}


def lock_folder(folder: Path) -> None:
    """Make this process the owner of a run folder, until `unlock_folder` or its end; makes the folder where absent.

    A process that owns the folder already keeps it. Files that a killed owner left half written are removed. Raises
    ValueError, naming the owner, when another process has the folder; OSError when the folder cannot be written to.
    """
    real = Path(os.path.realpath(folder))
    if real in _held:
        return
    descriptor = file_lock.open_locked(lock_file(folder))
    if descriptor is None:
        raise ValueError(
            f"{folder} is in use by {_owner(lock_file(folder))}: wait for its end, or choose another name=..."
        )
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(_this_process()).encode())
    _held[real] = descriptor
    atexit.register(unlock_folder, folder, os.getpid())
    for part in unfinished_files(folder):
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def unlock_folder(folder: Path, process: int | None = None) -> None:
    """Release a run folder that this process owns, and remove the folder where nothing has been written to it.

    process: the owner, where the caller may be a fork of it.
    """
    descriptor = _held.pop(Path(os.path.realpath(folder)), None)
    if descriptor is None or process not in (None, os.getpid()):
        return
    # Removed while it is locked: who waits for it notices, see `open_locked`.
    lock_file(folder).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
    os.close(descriptor)


def _this_process() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _owner(lock: Path) -> str:
    """The owner of a lock file for a message; a process that has only just locked it may not have written it yet."""
    try:
        owner = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on host {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
