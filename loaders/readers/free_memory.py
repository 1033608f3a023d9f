"""How much memory is free, and how to write it down."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory still free on `device`; on a CPU also within the job's control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free


def free_share(device: torch.device, processes: int) -> int:
    """What one of so many processes of this machine may take: each has a GPU of its own, but all share the memory."""
    return free_bytes(device) // (processes if device.type == "cpu" else 1)


def readable(num_bytes: int) -> str:
    """In GiB or MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
