"""How the processes that a launcher has started find each other, also when it has started them again.

The processes of torch.distributed tell each other their addresses through a store. torchrun keeps one store as long as
it runs. Processes that it starts again would find there the addresses of those that have ended, and call them. Nothing
that the launchers hand out tells one start from another on all machines: each launcher counts those starts alone that
its own processes have caused. So process 0 gives each start a name, under which its keys stand apart from all others:

    each process    ->  puts a new word of its own under hello/RANK
    process 0       ->  answers each word with the name of its start
    each process    ->  puts its placement under the name that is the answer to its word
    all placements  ->  all processes of this start live, and torch.distributed connects them under its name

A process that has ended answers no new word, and has put nothing under a new name.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

from fastlt.device.placement import Placement

FIND_S = 300.0  # for all processes to come: they are started together, and load the same packages
PAUSE_S = 0.05  # between two looks into the store


@dataclass(frozen=True)
class Start:
    """Processes that were started together and have found each other.

    name: no other start has it. store: by which torch.distributed connects them. placements: of each, by rank.
    """

    name: str
    store: dist.Store
    placements: tuple[Placement, ...]


def find_processes(rank: int, count: int, placement: Placement) -> Start:
    """Wait for the `count` processes of which this one is number `rank`, as MASTER_ADDR and MASTER_PORT say where.

    ConnectionError when one of them has not come within `FIND_S`, or the store cannot be reached.
    """
    try:
        store, *_ = next(dist.rendezvous("env://", rank, count, timeout=timedelta(seconds=FIND_S)))
        found = meet(store, rank, count, placement, FIND_S)
    except (dist.DistError, TimeoutError) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise ConnectionError(
            f"process {rank}, on host {placement.host}: the processes of this run have not found each other at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: {why}; the same command goes on from the last "
            "checkpoint"
        ) from error
    store.set_timeout(default_pg_timeout)  # that of torch.distributed's own stores
    return found


def meet(store: dist.Store, rank: int, count: int, placement: Placement, timeout_s: float) -> Start:
    """What `find_processes` does in a store; TimeoutError with the processes that have not come."""
    own, deadline = dist.PrefixStore("fastlt", store), time.monotonic() + timeout_s
    word = uuid.uuid4().hex
    own.set(_hello(rank), word)
    name, start = b"", None
    while True:
        answer = word.encode() if rank == 0 else _read(own, _answer_to(word))
        if answer != name:  # once, unless process 0 alone is started again
            name, start = answer, dist.PrefixStore(answer.decode(), store)
            start.set(_place(rank), _as_text(placement))
        missing = [0] if start is None else [other for other in range(count) if not start.check([_place(other)])]
        if start is not None and not missing:
            return Start(name.decode(), start, tuple(_of_text(start.get(_place(other))) for other in range(count)))
        if rank == 0:
            for other in missing:
                own.set(_answer_to(_read(own, _hello(other)).decode()), word)
        if time.monotonic() > deadline:
            raise TimeoutError(f"{_have_not_come(missing)} within {timeout_s:.0f} s")
        time.sleep(PAUSE_S)


def _as_text(placement: Placement) -> str:
    return json.dumps([placement.host, placement.node, sorted(placement.cores)])


def _of_text(text: bytes) -> Placement:
    host, node, cores = json.loads(text)
    return Placement(host, node, frozenset(cores))


def _read(store: dist.Store, key: str) -> bytes:
    """Empty where nothing is."""
    return store.get(key) if store.check([key]) else b""


def _hello(rank: int) -> str:
    return f"hello/{rank}"


def _answer_to(word: str) -> str:
    return f"answer/{word}"


def _place(rank: int) -> str:
    return f"placement/{rank}"


def _have_not_come(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"process {ranks[0]} has not come"
    return f"processes {', '.join(map(str, ranks))} have not come"
