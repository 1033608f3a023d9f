"""The process that forks the workers of the torch loader: it ends at once with its parent, and leaves nothing behind.

Imported in the fork server before anything else. By itself it would end seconds after a parent that was killed, when
it has imported and cleaned up what it was asked to, and would leave the folder of its socket.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.util
import os
import shutil
import signal
import sys
from collections.abc import Iterable
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path

from fastlt.parent_process import end_with_parent
from loaders.stored.damage import ReaderError

SHARED_MEMORY = Path("/dev/shm")
LONGEST_SOCKET = 107  # bytes of a socket's path, see unix(7)
SOCKET_BYTES = len("/listener-12345678")  # as multiprocessing names it, in its own folder
# Environment variable of the fork server: its parent's number and the folder of its socket.
PARENT = "FASTLT_FORK_SERVER"
GONE = signal.SIGUSR2  # tells it that its parent is gone; children of the fork server are never sent it


def fork_server(preloaded: list[str]) -> BaseContext:
    """A context whose processes are forked by a fork server that has imported the modules `preloaded`.

    ReaderError where the path of its socket would be longer than the system allows.
    """
    folder = multiprocessing.util.get_temp_dir()
    if len(os.fsencode(folder)) + SOCKET_BYTES > LONGEST_SOCKET:
        raise ReaderError(
            f"the folder for temporary files, {Path(folder).parent}, has too long a path for the socket of the torch "
            "loader's workers; set TMPDIR to a shorter one, or data.num_workers=0"
        )
    # Semaphores that exist when a kill comes and are not yet registered can be told from others' then.
    multiprocessing.current_process()._config["semprefix"] = _semaphores(os.getpid())  # pyright: ignore
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *preloaded])
    os.environ[PARENT] = f"{os.getpid()}:{folder}"
    try:
        ensure_running()
    finally:
        del os.environ[PARENT]  # it is for the server; what else this process starts has another one
    return context


def remove_segments(workers: Iterable[int]) -> None:
    """Remove the shared memory that ended workers have made and not passed on: torch leaves what it could not fill."""
    for pid in workers:
        for segment in SHARED_MEMORY.glob(f"torch_{pid}_*"):
            segment.unlink(missing_ok=True)


def _semaphores(parent: int) -> str:
    return f"/mp-fastlt-{parent}"


def _watch_parent(parent: int, folder: str) -> None:
    server = os.getpid()

    def gone(number: int, frame: object) -> None:
        if os.getpid() != server or os.getppid() == parent:
            return  # a fork of it, or a thread of the parent has ended and not the parent
        workers = [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
        remove_segments(workers)
        for path in SHARED_MEMORY.glob(f"sem.{_semaphores(parent)[1:]}-*"):
            path.unlink(missing_ok=True)  # by the resource tracker, perhaps
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)

    signal.signal(GONE, gone)
    end_with_parent(parent, GONE)


if PARENT in os.environ and any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    _parent, _folder = os.environ[PARENT].split(":", 1)
    _watch_parent(int(_parent), _folder)
