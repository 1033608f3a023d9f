"""How much memory is free, and how to write it down."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory still free on `device`; on a CPU also within the control groups of the job."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([psutil.virtual_memory().available, *map(_left_in_group, _groups())])


def _groups() -> list[Path]:
    """The folders of this process's control group and those above it that limit memory (cgroup v2)."""
    try:
        own = next(line[3:] for line in OWN_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        own = "/"
    inner = CGROUP / own.strip("/")
    above = [inner, *inner.parents]
    return [group for group in above if group.is_relative_to(CGROUP) and _limit(group) is not None]


def _limit(group: Path) -> int | None:
    """Bytes; None without a limit."""
    try:
        text = (group / "memory.max").read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def _left_in_group(group: Path) -> int:
    """Bytes up to the limit; files that the kernel keeps in memory count as used there, and go when it needs room."""
    limit = _limit(group)
    assert limit is not None, group
    try:
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # a container that shows the limit alone
        return limit
    return max(0, limit - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0)))


def free_share(device: torch.device, processes: int) -> int:
    """What one of so many processes of this machine may take: each has a GPU of its own, but all share the memory."""
    return free_bytes(device) // (processes if device.type == "cpu" else 1)
