"""Processes that tell each other why they end, as threads with one store: each test has a run of its own in it."""

from __future__ import annotations

import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from fastlt.device import peers as module
from fastlt.device.peers import Failure, Peers, is_broken_connection
from fastlt.device.placement import Placement

TWO_NODES = [Placement(host, host, frozenset({0})) for host in ("a", "a", "b", "b")]
ONE_NODE = [Placement("a", "a", frozenset({0}))] * 2


class Exit(BaseException):
    """In the place of the end of a process."""


@pytest.fixture(scope="module")
def store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def ended(monkeypatch, store):
    """The exit codes with which threads have ended their process, in the order of time."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    for name, seconds in {"BEAT_S": 0.02, "GRACE_S": 0.3, "WORD_S": 0.2, "BEFORE_NOTICE_S": 0.4}.items():
        monkeypatch.setattr(module, name, seconds)
    codes = []
    monkeypatch.setattr(module.os, "_exit", codes.append)
    return codes


@pytest.fixture
def told(monkeypatch):
    """What is printed."""
    lines = []
    monkeypatch.setattr(module, "print_error", lambda error: lines.append(str(error)))
    return lines


@contextmanager
def processes(placements):
    run = uuid.uuid4().hex
    everybody = [Peers(rank, placements, run) for rank in range(len(placements))]
    try:
        yield everybody
    finally:
        for one in reversed(everybody):  # process 0 waits for the others
            one.close()


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_message_of_one_ends_all_and_is_told_once_a_node(ended, told):
    with processes(TWO_NODES) as everybody:
        failure = everybody[3].fail("KeyError: 'x'", 1, broken=False)
        everybody[3].tell(failure)
        until(lambda: len(ended) >= 3)
        assert {peers.noticed.is_set() for peers in everybody} == {True}
    assert failure == Failure(3, "b", "KeyError: 'x'", 1)
    assert set(told) == {"process 3, on host b: KeyError: 'x'"}
    assert ended[:3] == [1, 1, 1]


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_who_tells(ended, told, rank):
    """The process that failed on its node, the first of another one; for one that is gone, the first beside it."""
    with processes(TWO_NODES) as everybody:
        everybody[rank].tell(Failure(3, "b", "why", 2))
        assert len(told) == (rank in (0, 3))
        told.clear()
        everybody[rank].tell(Failure(2, "b", "why", 2, gone=True))
        assert len(told) == (rank in (0, 3))


def test_a_failure_of_all_is_none_of_one(ended, told):
    with processes(TWO_NODES) as everybody, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda peers: peers.fail("no such recipe", 2, broken=False), everybody))
        time.sleep(0.6)
    assert found == [None] * 4
    assert not ended
    assert not told


def test_the_first_failure_is_that_of_all(ended, told):
    """The second one has its reason in the first: a connection that was closed, or anything else."""
    with processes(ONE_NODE) as (first, second), ThreadPoolExecutor(1) as pool:
        one = pool.submit(first.fail, "disk full", 2, broken=False)
        until(lambda: first.store.check(["failure"]))
        other = second.fail("RuntimeError: Connection closed by peer", 1, broken=True)
        assert one.result() == other == Failure(0, "a", "disk full", 2)


def test_a_process_that_was_killed_is_named_by_one_whose_connection_broke(ended, told):
    with processes(TWO_NODES) as everybody:
        everybody[2]._stopped.set()  # its thread has ended, and it has not said so
        everybody[2]._thread.join()
        failure = everybody[0].fail("RuntimeError: Connection reset by peer", 1, broken=True)
    assert (failure.rank, failure.host, failure.gone, failure.code) == (2, "b", True, 1)
    assert "ended without a word" in failure.message
    assert "goes on from the last checkpoint" in failure.message


def test_a_broken_connection_without_a_process_that_is_gone_is_told_as_it_is(ended, told):
    with processes(ONE_NODE) as (first, _):
        failure = first.fail("RuntimeError: no route", 1, broken=True)
    assert failure == Failure(0, "a", "RuntimeError: no route", 1)


def test_a_process_without_a_sign_of_life_is_noticed_by_the_one_before_it(ended, told, monkeypatch):
    monkeypatch.setattr(module, "GONE_S", 0.5)
    with processes(ONE_NODE) as (first, second):
        until(lambda: first._neighbours_beat)
        second._stopped.set()
        second._thread.join()
        until(lambda: ended)
        assert json.loads(first.store.get("failure"))["rank"] == 1
    assert ended[0] == 1
    assert "process 1, on host a: it ended without a word" in told[0]


def test_who_is_done_is_not_gone(ended, told, monkeypatch):
    monkeypatch.setattr(module, "GONE_S", 0.2)
    with processes(ONE_NODE) as (first, second):
        until(lambda: first._neighbours_beat)
        second.close()
        time.sleep(0.6)
        assert not first.store.check(["failure"])
    assert not ended


def test_a_store_that_is_gone_is_the_end_of_process_0(ended, told, monkeypatch):
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_PORT", str(host.port))
    with processes(ONE_NODE) as (_, second):
        del host
        until(lambda: ended and told)
        assert second.fail("RuntimeError: broken pipe", 1, broken=True).rank == 0
    assert "process 0, on host a: it ended without a word" in told[0]


def test_they_meet_however_long_one_works(ended):
    with processes(ONE_NODE) as (first, second):
        came = []

        def wait():
            first.meet()
            first.meet()
            came.append("first")

        thread = threading.Thread(target=wait)
        thread.start()
        second.meet()
        time.sleep(0.3)
        assert not came
        second.meet()
        thread.join(10)
        assert came == ["first"]


def test_an_error_of_a_collective_is_known_by_where_it_comes_from():
    with pytest.raises(ValueError, match="process group") as not_broken:
        dist.get_world_size(object()) if dist.is_initialized() else dist.barrier()
    assert not is_broken_connection(not_broken.value)
    for error, broken in ((KeyError("x"), False), (RuntimeError("no memory"), False), (dist.DistNetworkError(), True)):
        assert is_broken_connection(error) == broken
    for module_name in ("torch.distributed.distributed_c10d", "fastlt.device.distributed"):
        scope = {"__name__": module_name}
        exec(compile("def f():\n    raise RuntimeError('Connection closed by peer')", "file.py", "exec"), scope)
        with pytest.raises(RuntimeError) as of_collective:
            scope["f"]()
        assert is_broken_connection(of_collective.value)
