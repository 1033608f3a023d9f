"""A process that asked for it is told of its parent's end, even when that came first."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHILD = (
    "import signal, sys, time; from fastlt.parent_process import end_with_parent\n"
    "signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit()))\n"
    "end_with_parent(int(sys.argv[1]), signal.SIGTERM)\n"
    "print('waiting', flush=True); time.sleep(60)"
)
PARENT = "import os, subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1], str(os.getpid())])"


def test_a_child_is_told_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout.readline() == "waiting\n"
    parent.kill()
    assert parent.stdout.read() == "told\n"
    parent.wait()


def test_a_child_whose_parent_was_gone_before_is_told_at_once():
    done = subprocess.run([sys.executable, "-c", CHILD, "1"], stdout=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "told\n"


def test_by_default_it_is_killed():
    program = "from fastlt.parent_process import end_with_parent; end_with_parent(1)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == -signal.SIGKILL
