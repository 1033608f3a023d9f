"""Forked processes that work on chunks: all results, and none of them left behind, whenever a signal comes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loaders.stored.forked_workers import describe_exit, image_done, map_chunks, signals_held

ROOT = Path(__file__).resolve().parents[2]
CHUNKS = [range(3 * i, 3 * i + 3) for i in range(40)]

INTERRUPTED = """
import sys, time
from fastlt.commands.signals import Terminated, ended_by_signals
from loaders.stored.forked_workers import map_chunks

def work(subject, chunk):
    time.sleep(0.002)

if __name__ == "__main__":
    try:
        with ended_by_signals():
            print("ready", flush=True)
            while True:
                list(map_chunks(work, None, [range(1)] * 6, num_workers=3))
    except Terminated:
        sys.exit(143)
"""


def squares(offset: int, chunk: range) -> list[int]:
    for _ in chunk:
        image_done()
    return [offset + i**2 for i in chunk]


def test_every_chunk_is_answered_once_and_counted():
    seen = []
    answers = dict(map_chunks(squares, 7, CHUNKS, num_workers=3, advance=seen.append))
    assert answers == {chunk: squares(7, chunk) for chunk in CHUNKS}
    assert sum(seen) == 120
    assert list(map_chunks(squares, 7, [], num_workers=3)) == []
    assert multiprocessing.active_children() == []


def refuse(subject: object, chunk: range) -> None:
    if 30 in chunk:
        raise OSError(28, "No space left on device", "file")


def test_an_error_comes_as_it_was_raised_and_a_caller_may_leave_early():
    with pytest.raises(OSError, match="No space left") as raised:
        list(map_chunks(refuse, None, CHUNKS, num_workers=2))
    assert raised.value.errno == 28
    assert "in refuse" in str(raised.value.__cause__)  # the process's traceback
    for _ in map_chunks(squares, 0, CHUNKS, num_workers=2):
        break
    assert multiprocessing.active_children() == []


def stop(subject: object, chunk: range) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def die(subject: object, chunk: range) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_stopped_and_a_dead_process_are_told_and_ended():
    with pytest.raises(ValueError, match=r"no image was finished for 0\.5 s, from number 0"):
        list(map_chunks(stop, None, CHUNKS, num_workers=2, timeout_s=0.5))
    with pytest.raises(ValueError, match=r"a process that decoded images died \(signal 15, SIGTERM\)"):
        list(map_chunks(die, None, CHUNKS, num_workers=2))
    assert multiprocessing.active_children() == []
    assert describe_exit(3) == "exit code 3"


def test_a_signal_while_processes_are_forked_leaves_none_behind():
    """At random moments, of which some lie between a fork and its record."""
    rng, workers = random.Random(0), []
    for _ in range(4):
        words = [sys.executable, "-c", INTERRUPTED]
        workers.append(subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True))
    for process in workers:
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.02))
        process.terminate()
    for process in workers:
        process.communicate(timeout=20)
        assert process.returncode == 143
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_held_signals_come_afterwards_through_the_handler_that_was_there():
    came = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append("signal"))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with signals_held():
            signal.raise_signal(signal.SIGTERM)
            came.append("end of the block")
        assert came == ["end of the block", "signal"]
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_processes_end_with_the_one_that_forked_them():
    code = (
        "import os, time\n"
        "from loaders.stored.forked_workers import map_chunks\n"
        "def forever(subject, chunk):\n"
        "    print(os.getpid(), flush=True); time.sleep(600)\n"
        "list(map_chunks(forever, None, [range(1)] * 3, num_workers=3))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True)
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError("processes outlived the one that forked them")
