"""LLVM's OpenMP is the one that torch uses where it is installed, and trains to the same bits as GNU's."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fastlt.device import openmp

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import hashlib, sys
from fastlt.device.openmp import load_llvm_openmp, runtime
load_llvm_openmp()
import torch
torch.set_num_threads(2)
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 16, 3, padding=1), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3),
    torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 10),
)
loss = torch.nn.functional.cross_entropy(model(torch.rand(64, 3, 32, 32)), torch.arange(64) % 10)
loss.backward()
digest = hashlib.sha256(b"".join(p.grad.numpy().tobytes() for p in model.parameters()))
torch.ones(1 << 20).sum()
print(runtime(), digest.hexdigest())
"""


@pytest.fixture
def llvm() -> None:
    for library in openmp.LIBRARIES:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return
    pytest.skip(f"{openmp.ADVISED_PACKAGE} is not installed")


def trained(**environment: str) -> list[str]:
    run = subprocess.run(
        [sys.executable, "-c", STEP],
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.split()


def test_both_runtimes_train_to_the_same_bits(llvm):
    ours, digest = trained()
    assert ours == "llvm"
    assert trained(**{openmp.VARIABLE: openmp.GNU}) == [openmp.GNU, digest]


def test_torch_computes_by_the_runtime_that_was_loaded(llvm):
    """LLVM's alone prints its settings when its first threads start."""
    code = "from fastlt.device.openmp import load_llvm_openmp as load; load(); import torch; torch.ones(1 << 20).sum()"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KMP_SETTINGS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "KMP_BLOCKTIME" in run.stdout + run.stderr


def test_neither_the_process_nor_a_fork_leaves_a_file(llvm):
    """Also where they are killed, or end without cleaning up.

    The fork only asks the runtime, which makes its file: no runtime promises a forked process a team of threads.
    """
    code = (
        "import ctypes, os, signal; from fastlt.device.openmp import load_llvm_openmp as load; load(); import torch\n"
        "torch.ones(1 << 20).sum(); print(os.getpid())\n"
        "if not (child := os.fork()): ctypes.CDLL(None).omp_get_max_threads(); os._exit(0)\n"
        "os.waitpid(child, 0); print(child, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == -signal.SIGKILL, run.stderr
    processes = run.stdout.split()
    assert len(processes) == 2
    left = [path.name for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("__KMP_REGISTERED_LIB_*")]
    assert not [name for name in left if name.split("_")[5] in processes]


def test_a_library_that_is_not_there_is_refused_before_work():
    run = subprocess.run(
        [sys.executable, "-m", "fastlt", "train", "digits_lt", "--check"],
        env={**os.environ, openmp.VARIABLE: "libabsent.so"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "FASTLT_OPENMP is 'libabsent.so'" in run.stderr


def test_only_a_busy_machine_with_gnus_runtime_is_told(monkeypatch):
    for runtime, load, told in (("gnu", 2.0, True), ("gnu", 0.2, False), ("llvm", 2.0, False)):
        monkeypatch.setattr(openmp, "runtime", lambda runtime=runtime: runtime)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert (openmp.why_neighbours_slow() is not None) == told
