"""Freed blocks of megabytes are reused, with glibc's malloc and with those that can be preloaded."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fastlt.device import host_memory

ENTRY = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
PRELOADED = {
    "jemalloc": "libjemalloc.so.2",
    "mimalloc": "libmimalloc.so.2",
    "tcmalloc": host_memory.ADVISED,
}

CODE = """
import resource, sys
import numpy as np
from fastlt.device.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    np.empty(32 << 20, np.uint8).fill(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.empty(32 << 20, np.uint8).fill(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    run = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told")
def test_memory_that_was_freed_is_not_faulted_in_again():
    assert page_faults("keep") < 100 < page_faults("give back")


def needs(library: str) -> None:
    said = subprocess.run(["true"], env={**os.environ, "LD_PRELOAD": library}, capture_output=True, text=True).stderr
    if "cannot be preloaded" in said:
        pytest.skip(f"{library} is not installed")


def preloading(library: str, *command: str) -> str:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**os.environ, "LD_PRELOAD": library},
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


@pytest.mark.parametrize("name", PRELOADED)
def test_a_preloaded_allocator_is_known_and_left_alone(name):
    needs(PRELOADED[name])
    code = "from fastlt.device.host_memory import *; print(allocator(), keep_freed_memory(), why_holes_stay())"
    assert preloading(PRELOADED[name], "-c", code) == f"{name} False None"


def test_the_c_library_is_named_where_nothing_is_preloaded():
    if os.environ.get("LD_PRELOAD"):
        pytest.skip("LD_PRELOAD is set")
    assert host_memory.allocator() == " ".join(platform.libc_ver())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_lean_step_takes_at_most_1_3_times_the_memory_of_a_plain_one():
    """ResNet-32, batches of 128. What is freed has to be reused for it, which glibc's malloc does in part only."""
    needs(host_memory.ADVISED)

    def peak(way: str) -> int:
        return int(preloading(host_memory.ADVISED, str(ENTRY), "step", "--device", "cpu", "--peak-of", way))

    assert 1 < peak("lean") / peak("plain") <= 1.3
