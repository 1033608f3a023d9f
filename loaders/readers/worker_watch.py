"""Watching a loader's processes while its reader waits for them."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from loaders.sources.messages import readable_bytes
from loaders.stored.damage import DamageError, ReaderError
from loaders.stored.forked_workers import describe_exit
from loaders.stored.mapped_file import cut_short

POLL_S = 0.5
STOPPED_S = 3.0  # a process that is stopped for so long, while its reader runs and waits, is taken for lost
SLOW_S = 10.0  # without a batch, after which the user is told what is waited for
SHARED_MEMORY = Path("/dev/shm")
STOPPED, DEAD = "T", "Z"  # states of a process, as proc(5) calls them
MEANING = {"D": "waits for the disk", "R": "computes", "S": "waits", STOPPED: "is stopped"}


class WorkerWatch:
    """A thread that looks after processes while their reader waits for a batch, and ends them when none can come.

    A reader could wait for a dead or a stopped process for ever. When all of them are ended, the wait ends in an
    exception, and `waiting` gives the reason in its place. A slow disk is not taken for a dead one: the user is told
    once what is waited for; after `patience_s` the wait ends.

    source: what is read, for messages.  processes: started by `multiprocessing`, in whichever way.
    """

    def __init__(self, source: Path, processes: Sequence[BaseProcess], patience_s: float) -> None:
        self._source, self._processes, self._patience_s = source, processes, patience_s
        self._since: float | None = None
        self._problem: ReaderError | BaseProcess | None = None  # a process: one that died
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="worker-watch")
        self._thread.start()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the reader waits for a batch.

        Raises DamageError when a file became shorter, ReaderError when a process died, was stopped or stuck.
        """
        self._since = time.monotonic()
        try:
            yield
        except Exception as error:
            raise self._reason(error) from error
        finally:
            self._since = None

    def close(self) -> None:
        """End the processes that could not be waited for, and the thread."""
        self._closed.set()
        self._thread.join()
        for process in self._processes:
            if _state(process) == STOPPED:
                process.kill()

    def _run(self) -> None:
        stopped_s: dict[int | None, float] = {}
        told = False
        while not self._closed.wait(POLL_S) and self._problem is None:
            since = self._since
            if since is None:
                stopped_s.clear()
                told = False
                continue
            states = {process.pid: _state(process) for process in self._processes}
            for pid, state in states.items():
                stopped_s[pid] = stopped_s.get(pid, 0.0) + POLL_S if state == STOPPED else 0.0
            waited = time.monotonic() - since
            if DEAD in states.values():
                self._give_up(next(process for process in self._processes if states[process.pid] == DEAD))
            elif max(stopped_s.values()) >= STOPPED_S:
                stopped = max(stopped_s, key=lambda pid: stopped_s[pid])
                self._give_up(self._failed(f"worker process {stopped} is stopped (SIGSTOP)", "Start again"))
            elif waited >= self._patience_s:
                advice = "Is the disk reachable? data.num_workers=0 reads without worker processes"
                self._give_up(self._failed(f"there was no batch for {waited:.0f} s", advice))
            elif waited >= SLOW_S and not told:
                told = True
                tqdm.write(f"fastlt: still waiting for images of {self._source}: {_listed(states)}", file=sys.stderr)

    def _give_up(self, problem: ReaderError | BaseProcess) -> None:
        self._problem = problem
        for process in self._processes:
            if _state(process) != DEAD:
                process.kill()

    def _reason(self, error: Exception) -> Exception:
        """What to raise for an exception in the reader's wait."""
        if self._problem is not None:
            return self._death(self._problem) if isinstance(self._problem, BaseProcess) else self._problem
        if isinstance(error, DamageError | ReaderError):
            return error
        wait([process.sentinel for process in self._processes], timeout=POLL_S)
        dead = [process for process in self._processes if process.exitcode is not None]
        return self._death(dead[0]) if dead else error

    def _death(self, process: BaseProcess) -> Exception:
        process.join(POLL_S)
        code = process.exitcode
        short = cut_short(self._source) if code == -signal.SIGBUS else None
        if short is not None:
            return DamageError(short)
        if code == -signal.SIGBUS:
            return shared_memory_error(self._source, len(self._processes))
        cause = "; most likely memory ran out" if code == -signal.SIGKILL else ""
        what = f"worker process {process.pid} ended ({describe_exit(code)}{cause})"
        return self._failed(what, f"Use fewer workers than {len(self._processes)} (data.num_workers=…)")

    def _failed(self, what: str, advice: str) -> ReaderError:
        return ReaderError(
            f"reading {self._source}: {what}. {advice}; the same command goes on from the last checkpoint"
        )


def shared_memory_error(source: Path, workers: int) -> ReaderError:
    """What to say when there is no room for a batch in shared memory."""
    usage = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    room = "" if usage is None else f" ({readable_bytes(usage.free)} of {readable_bytes(usage.total)} are free)"
    return ReaderError(
        f"reading {source}: shared memory, {SHARED_MEMORY}, has no room{room} for the batches of {workers} workers. "
        "Use fewer (data.num_workers=…; 0 needs none of it), or make it larger (docker run --shm-size=8g)"
    )


def shared_memory_free() -> float:
    """Bytes of shared memory that are free; infinite where it is no folder."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else math.inf


def _state(process: BaseProcess) -> str:
    """The letter of a process's state, DEAD when it is gone; "?" where the system does not tell."""
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return DEAD if os.path.exists("/proc/self/stat") else "?"


def _listed(states: Mapping[int | None, str]) -> str:
    return ", ".join(f"worker {pid} {MEANING.get(state, f'is in state {state}')}" for pid, state in states.items())
