"""Processes that are started, also once more, find those that were started with them: threads with one store."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fastlt.device import rendezvous
from fastlt.device.placement import Placement
from fastlt.device.rendezvous import find_processes, meet


@pytest.fixture
def store():
    """As that of torchrun, which outlives the processes."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def placement(rank, start=0):
    """The cores tell one start of a process from another one."""
    return Placement("host", f"node{rank}", frozenset({start}))


def come(store, rank, count, start=0, timeout_s=10.0):
    """By a connection of its own, as a process has it."""
    own = dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    return meet(own, rank, count, placement(rank, start), timeout_s)


def come_together(store, count, start=0):
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: come(store, rank, count, start), range(count)))


def test_all_learn_the_name_of_their_start_and_where_each_is(store):
    found = come_together(store, 4)
    assert len({one.name for one in found}) == 1
    assert {one.placements for one in found} == {tuple(placement(rank) for rank in range(4))}


def test_those_that_are_started_again_do_not_take_the_words_of_those_before(store):
    """Also with fewer processes, and with more."""
    names = set()
    for start, count in enumerate((3, 3, 2, 4)):
        found = come_together(store, count, start)
        assert {one.placements for one in found} == {tuple(placement(rank, start) for rank in range(count))}
        assert not any(one.store.check(["address"]) for one in found), "nothing of former starts is in their store"
        found[0].store.set("address", "of this start")
        assert all(one.store.get("address") == b"of this start" for one in found)
        names.add(found[0].name)
    assert len(names) == 4


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_process_that_has_ended_is_not_taken_for_the_one_that_comes(store, dead):
    """It has come and has not met the others; the others come, wait, and go with it; then all are started again."""
    for rank in range(3):
        if rank != dead:
            with pytest.raises(TimeoutError):
                come(store, rank, 3, timeout_s=0)
    with ThreadPoolExecutor(3) as pool:
        alive = [rank for rank in range(3) if rank != dead]
        coming = [pool.submit(come, store, rank, 3, 1) for rank in alive]
        time.sleep(0.3)
        assert not any(one.done() for one in coming)
        found = [come(store, dead, 3, 1), *(one.result() for one in coming)]
    assert {one.placements for one in found} == {tuple(placement(rank, 1) for rank in range(3))}
    assert len({one.name for one in found}) == 1


def test_process_0_may_be_started_again_alone(store):
    """As by launchers that do not learn of each other's restarts, while the others still wait."""
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(come, store, 1, 3)
        with pytest.raises(TimeoutError):
            come(store, 0, 3, timeout_s=0.3)
        others = [waiting, pool.submit(come, store, 2, 3)]
        found = [come(store, 0, 3, start=1), *(one.result() for one in others)]
    assert {one.placements for one in found} == {(placement(0, 1), placement(1), placement(2))}
    assert len({one.name for one in found}) == 1


def test_who_has_not_come_is_named(store):
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(come, store, rank, 4, timeout_s=1.0) for rank in (0, 2)]
        told = [str(one.exception()) for one in waiting]
    assert told == ["processes 1, 3 have not come within 1 s"] * 2


def test_a_process_that_waits_alone_names_process_0(store):
    with pytest.raises(TimeoutError, match=r"^process 0 has not come within 0 s$"):
        come(store, 1, 2, timeout_s=0)


def test_the_end_of_the_wait_says_where_and_how_to_go_on(store, monkeypatch):
    monkeypatch.setattr(rendezvous, "FIND_S", 0.2)
    for variable, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.raises(ConnectionError) as ended:
        find_processes(0, 2, placement(0))
    assert str(ended.value) == (
        "process 0, on host host: the processes of this run have not found each other at "
        f"127.0.0.1:{store.port}: process 1 has not come within 0 s; the same command goes on from the last checkpoint"
    )


def test_a_store_that_nobody_holds_ends_the_wait(monkeypatch):
    monkeypatch.setattr(rendezvous, "FIND_S", 0.2)
    for variable, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(ConnectionError, match=r"each other at 127\.0\.0\.1:9: The client socket has timed out"):
        find_processes(1, 2, placement(1))
