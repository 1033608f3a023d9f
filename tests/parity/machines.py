"""Machines without a shared disk: folders in which processes run that are connected over the loopback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastlt.benchmarks.file_server import free_port

ROOT = Path(__file__).resolve().parents[2]
PROCESS = Path(__file__).with_name("node_process.py")


def environment(**more: str) -> dict[str, str]:
    """For processes on CPUs that find fastlt from any folder."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **own, **more}


@dataclass
class Machines:
    """folders: one a machine, the working directory of its processes. per_node: processes on each."""

    folders: Sequence[Path]
    per_node: int = 1
    started: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def start(self, *words: str, fault: str = "none") -> None:
        """Processes as torch's launcher starts them, without the launcher."""
        port, count = free_port(), len(self.folders) * self.per_node
        for rank in range(count):
            node, local = divmod(rank, self.per_node)
            variables = {
                **{"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": self.per_node},
                **{"GROUP_RANK": node, "GROUP_WORLD_SIZE": len(self.folders)},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            }
            command = [sys.executable, str(PROCESS), fault, *words]
            self._start(node, command, **{name: str(value) for name, value in variables.items()})

    def launch(self, *words: str, fault: str = "none", options: Sequence[str] = ()) -> None:
        """torchrun on each machine."""
        port = free_port()
        for node in range(len(self.folders)):
            self.launch_node(node, port, *words, fault=fault, options=options)

    def launch_node(self, node: int, port: int, *words: str, fault: str = "none", options: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(self.folders))]
        command += ["--nproc_per_node", str(self.per_node), "--rdzv_backend", "c10d", "--rdzv_id", "1"]
        command += ["--rdzv_endpoint", f"127.0.0.1:{port}", *options, str(PROCESS), fault, *words]
        self._start(node, command)

    def ends(self, timeout_s: float = 120.0) -> list[tuple[int, str, str]]:
        """Of each process that was started: exit code, stdout and stderr; forgets them."""
        deadline, found = time.monotonic() + timeout_s, []
        for process in self.started:
            out, told = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            found.append((process.returncode, out, told))
        self.started.clear()
        return found

    def _start(self, node: int, command: list[str], **variables: str) -> None:
        self.started.append(
            subprocess.Popen(
                command,
                cwd=self.folders[node],
                env=environment(**variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
