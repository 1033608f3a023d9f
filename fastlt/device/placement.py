"""Where the processes of a run are: on which machines, and which cores each of them may use."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where one process is.

    host: the name of its machine. node: the same for the processes that one launcher has started there, and for no
    others. cores: the numbers of those that it may use.
    """

    host: str
    node: str
    cores: frozenset[int]

    @classmethod
    def here(cls) -> Placement:
        """That of this process; GROUP_RANK is how torch's launcher counts nodes."""
        host = socket.gethostname()
        return cls(host, f"{host} {os.environ.get('GROUP_RANK', '')}", frozenset(os.sched_getaffinity(0)))


def node_ranks(placements: Sequence[Placement], rank: int) -> list[int]:
    """The processes on the node of process `rank`, itself among them, in order; placements: by rank."""
    return [other for other, placement in enumerate(placements) if placement.node == placements[rank].node]


def core_share(placements: Sequence[Placement], rank: int) -> int:
    """How many cores process `rank` has for itself, at least 1.

    A core that n processes of its node may use counts 1/n: torch's launcher lets all of them use all cores, Slurm
    may bind each task to cores of its own.
    """
    on_node = [placements[other].cores for other in node_ranks(placements, rank)]
    share = sum(1 / sum(core in cores for cores in on_node) for core in placements[rank].cores)
    return max(1, int(share + 1e-6))
