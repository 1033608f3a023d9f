"""What the processes of a run tell each other beside their collectives: that they live, and why one of them ends.

A collective cannot say that a process has failed. The others wait for it, or learn that a connection was closed. So
each process has a thread that looks into the store by which torch.distributed connected them:

    a process fails     ->  it puts its message into the store, waits for a moment, and ends
    the others notice   ->  the first of each node prints that message, and all end with its exit code
    a process is gone   ->  its beat in the store stands still, and another process says so for it
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from fastlt.device.placement import Placement, node_ranks
from fastlt.error_message import print_error

BEAT_S = 0.5  # between two looks into the store
GRACE_S = 3.0  # after a failure, for the others to fail in the same way
WORD_S = 3.0  # after a broken connection, for the word of the process that broke it
GONE_S = 60.0  # without a beat, after which a process is gone: longer than any call that keeps the interpreter's lock
ENDED = "ended"  # the beat of a process that has nothing more to do
BEFORE_NOTICE_S = GRACE_S + 2 * BEAT_S  # the process that failed ends first, so that a launcher names that one


@dataclass(frozen=True)
class Failure:
    """Why a run ends: the message of process `rank`, on `host`, and the exit code of all processes.

    gone: whether the process could not say it itself.
    """

    rank: int
    host: str
    message: str
    code: int
    gone: bool = False

    def __str__(self) -> str:
        return f"process {self.rank}, on host {self.host}: {self.message}"


class Peers:
    """The other processes of a run, for this one; starts the thread.

    rank: of this process. placements: of all, by rank. run: a word that no other run with this store has.
    """

    def __init__(self, rank: int, placements: Sequence[Placement], run: str) -> None:
        self.rank, self.placements = rank, placements
        # A connection of its own: torch's is locked while a collective waits.
        self.store = dist.PrefixStore(f"fastlt/{run}", _store())
        self.met = 0
        self.noticed = threading.Event()
        self._failing, self._stopped = threading.Event(), threading.Event()
        self._closed = False
        self._beats = 0
        self._neighbour = (rank + 1) % len(placements)
        self._neighbours_beat, self._beat_since = b"", time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="peers")
        self._thread.start()

    def meet(self) -> None:
        """Wait until all processes have come here as often as this one, however long one of them works before."""
        self.met += 1
        key, pause_s = f"meeting/{self.met}", 0.001
        self.store.add(key, 1)
        while self.store.add(key, 0) < len(self.placements):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, BEAT_S / 2)

    def fail(self, message: str, code: int, *, broken: bool) -> Failure | None:
        """Tell the others that this process ends with an error, and wait until they know.

        Returns None when all processes end with this message; else the failure that came first, of this process or of
        another one. broken: whether the error says only that a connection has been closed.
        """
        self._failing.set()
        try:
            first = self._first(Failure(self.rank, self._host(self.rank), message, code), broken=broken)
            if first.gone or first.message != message:
                return first
            return None if self._all_alike() else first
        except RuntimeError:
            return self._store_is_gone()
        finally:
            self.noticed.set()
            self._stop_watching()

    def tell(self, failure: Failure) -> None:
        """Print the failure, in one process of each node: in the one that failed, if it can."""
        if self._speaks(failure):
            print_error(RuntimeError(str(failure)))

    def _speaks(self, failure: Failure) -> bool:
        on_node = node_ranks(self.placements, self.rank)
        if failure.rank in on_node:
            alive = [rank for rank in on_node if rank != failure.rank]
            speaks = alive[:1] if failure.gone else [failure.rank]
        else:
            speaks = on_node[:1]
        return self.rank in speaks

    def close(self) -> None:
        """This process has nothing more to do with the others; they may end before it, and it before them."""
        if self._closed:
            return
        self._closed = True
        self._stop_watching()
        with suppress(RuntimeError):
            self.store.set(_beat_of(self.rank), ENDED)
            self._leave("closed")

    def _stop_watching(self) -> None:
        """End the thread: one that is inside the store while Python ends would abort the process."""
        self._stopped.set()
        self._thread.join(WORD_S)

    def _host(self, rank: int) -> str:
        return self.placements[rank].host

    def _first(self, own: Failure, *, broken: bool) -> Failure:
        """The failure that came first; `own` is put there where there is none."""
        if broken:
            deadline = time.monotonic() + WORD_S
            while not self.store.check(["failure"]) and time.monotonic() < deadline:
                time.sleep(BEAT_S / 5)
            own = self._gone_peer() or own
        return Failure(**json.loads(self.store.compare_set("failure", "", json.dumps(asdict(own)))))

    def _all_alike(self) -> bool:
        """Whether all processes come to this failure within a moment."""
        self.store.add("alike", 1)
        if not self._count_reaches("alike", len(self.placements)):
            return False
        self._leave("left")
        return True

    def _leave(self, key: str) -> None:
        """Use the store no more. Process 0 may hold it, and stays for a moment until the others have left."""
        if self.rank == 0:
            self._count_reaches(key, len(self.placements) - 1)
        else:
            self.store.add(key, 1)

    def _count_reaches(self, key: str, count: int) -> bool:
        """Whether a counter in the store is so high within `GRACE_S`."""
        deadline = time.monotonic() + GRACE_S
        while self.store.add(key, 0) < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(BEAT_S / 10)
        return True

    def _gone_peer(self) -> Failure | None:
        """The failure of a process whose beat stands still."""
        if self.store.check(["failure"]):
            return None
        before = self._all_beats()
        time.sleep(4 * BEAT_S)
        after = self._all_beats()
        still = [rank for rank, beat in after.items() if beat == before[rank] and beat != ENDED.encode()]
        return self._gone(still[0]) if still else None

    def _all_beats(self) -> dict[int, bytes]:
        return {rank: self._beat(rank) for rank in range(len(self.placements)) if rank != self.rank}

    def _beat(self, rank: int) -> bytes:
        """The last sign of life of a process; empty before its first one."""
        return self.store.get(_beat_of(rank)) if self.store.check([_beat_of(rank)]) else b""

    def _gone(self, rank: int) -> Failure:
        how = "it ended without a word, as by a kill, or its machine cannot be reached"
        return Failure(
            rank, self._host(rank), f"{how}; the same command goes on from the last checkpoint", 1, gone=True
        )

    def _store_is_gone(self) -> Failure:
        """Process 0, or the launcher beside it, holds the store."""
        return self._gone(0)

    def _watch(self) -> None:
        """What the thread does."""
        while not self._stopped.wait(BEAT_S):
            try:
                self._beats += 1
                self.store.set(_beat_of(self.rank), str(self._beats))
                failure = self._posted()
            except RuntimeError:
                failure = self._store_is_gone()
            if failure is None or self._failing.is_set():
                continue
            self.noticed.set()
            if self._stopped.wait(BEFORE_NOTICE_S) or self._failing.is_set():
                continue
            if self._speaks(failure):
                print(file=sys.stderr)  # a progress bar has left its line open
                self.tell(failure)
            sys.stdout.flush()
            sys.stderr.flush()
            # The main thread may be in a collective, which nothing else ends.
            os._exit(failure.code)

    def _posted(self) -> Failure | None:
        """The failure in the store; that of the next process is put there when its beat has stood still for long."""
        if not self.store.check(["failure"]) and self._neighbour_is_gone():
            self.store.compare_set("failure", "", json.dumps(asdict(self._gone(self._neighbour))))
        return Failure(**json.loads(self.store.get("failure"))) if self.store.check(["failure"]) else None

    def _neighbour_is_gone(self) -> bool:
        beat, now = self._beat(self._neighbour), time.monotonic()
        if beat != self._neighbours_beat:
            self._neighbours_beat, self._beat_since = beat, now
        return beat != ENDED.encode() and now - self._beat_since > GONE_S


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error comes out of a collective: another process has ended."""
    if isinstance(error, dist.DistNetworkError) or not isinstance(error, RuntimeError):
        return isinstance(error, RuntimeError)
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_globals.get("__name__", ""))
        trace = trace.tb_next
    # A sum that was begun before is waited for in a function of ours.
    return frames[-1:] == ["fastlt.device.distributed"] or any(name.startswith("torch.distributed") for name in frames)


def _beat_of(rank: int) -> str:
    return f"beat/{rank}"


def _store() -> dist.TCPStore:
    """A connection to the store by which torch.distributed has connected the processes."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
