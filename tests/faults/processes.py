"""Commands in processes of their own that can be killed, and what they leave on the machine.

A `Sandbox` gives the commands of one case an environment mark, a temporary folder and, as root, a /dev/shm of their
own. So whatever they leave is theirs, also while other programs run on the machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SLOW_DISK = Path(__file__).with_name("slow_disk")
MARK = "FASTLT_FAULTS_SANDBOX"
GONE_S = 5.0  # how long processes may outlive the one that was killed
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Sandbox:
    """Where the commands of one case run.

    folder: below which they write. tmp: their TMPDIR, of a short path: a socket in it has 107 bytes at most. holder:
    a process in a mount namespace with its own /dev/shm; None where the machine's is used.
    """

    folder: Path
    tmp: Path
    holder: subprocess.Popen | None = None
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    before: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.before = self._entries()

    def start(self, *words: object, slow_disk_s: float = 0.0, **environment: str) -> subprocess.Popen:
        """`fastlt WORDS` in a session of its own; its output is appended to `output.txt`.

        slow_disk_s: how long each fsync and each renaming takes.
        """
        paths = [str(SLOW_DISK), str(ROOT)] if slow_disk_s else [str(ROOT)]
        environment = {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": os.pathsep.join(paths),
            "TMPDIR": str(self.tmp),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "torch"),  # kept on purpose, and by torch in TMPDIR
            "FASTLT_FAULTS_SLOW_DISK_S": str(slow_disk_s),
            **environment,
        }
        enter = []
        if self.holder is not None:
            enter = ["nsenter", "--target", str(self.holder.pid), "--mount", f"--wd={ROOT}", "--"]
        with self.output_file.open("ab") as output:
            return subprocess.Popen(
                [*enter, sys.executable, "-m", "fastlt", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )

    def run(self, *words: object, timeout_s: float = 300.0, **environment: str) -> int:
        """The exit code of `fastlt WORDS`."""
        process = self.start(*words, **environment)
        try:
            return process.wait(timeout_s)
        finally:
            self.end()

    @property
    def output_file(self) -> Path:
        return self.folder / "output.txt"

    @property
    def output(self) -> str:
        return self.output_file.read_text(errors="replace").replace("\r", "\n")

    def alive(self) -> dict[int, str]:
        """The sandbox's processes, each with its command line."""
        return {pid: _command(pid) for pid in _marked(self.mark) if self.holder is None or pid != self.holder.pid}

    def leftovers(self, patience_s: float = GONE_S) -> list[str]:
        """What the ended commands have left after a while: processes, shared memory, temporary files.

        Where /dev/shm is the machine's, other programs' segments come and go in it; one that was leaked stays.
        """
        deadline = time.monotonic() + patience_s
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left

    def _left(self) -> list[str]:
        left = [f"process {pid}: {command}" for pid, command in self.alive().items()]
        left += [f"/dev/shm/{name}" for name in sorted(self._entries() - self.before)]
        return left + [f"TMPDIR/{path.name}" for path in sorted(self.tmp.iterdir())]

    def end(self) -> None:
        """Kill what is still running."""
        for pid in self.alive():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _entries(self) -> set[str]:
        folder = SHARED_MEMORY if self.holder is None else Path(f"/proc/{self.holder.pid}/root/dev/shm")
        return {path.name for path in folder.iterdir()}


def can_mount() -> bool:
    """Whether this user may make a mount namespace with a tmpfs in it."""
    try:
        done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/dev/shm"], capture_output=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0


@contextmanager
def sandbox(folder: Path, shared_memory: str = "50%") -> Iterator[Sandbox]:
    """A sandbox whose processes are gone afterwards.

    shared_memory: the size of its /dev/shm, as `mount` takes it. Where nothing can be mounted, it is the machine's.
    """
    holder = _own_shared_memory(shared_memory) if can_mount() else None
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as tmp:
            made = Sandbox(folder, Path(tmp), holder)
            try:
                yield made
            finally:
                made.end()
    finally:
        if holder is not None:
            holder.kill()
            holder.wait()


def _own_shared_memory(size: str) -> subprocess.Popen:
    script = f"mount -t tmpfs -o size={size} none /dev/shm && echo mounted && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "mounted\n"
    return holder


def _marked(mark: str) -> list[int]:
    """Processes that were started with the mark in their environment, but for those that are zombies."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            try:
                if wanted in Path(entry.path, "environ").read_bytes():
                    found.append(int(entry.name))
            except (OSError, ValueError):
                continue  # gone meanwhile, or another user's
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "?"
