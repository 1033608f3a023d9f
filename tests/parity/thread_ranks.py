"""Ranks as threads of one process: what a step does over several processes, without starting any."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastlt.device.distributed import Reducer

# Threads share the default random generator: who seeds it and draws holds this.
SEEDED = threading.Lock()


@dataclass(frozen=True)
class Meeting:
    """Where the threads lay down what they have, and wait for each other."""

    world_size: int
    barrier: threading.Barrier
    laid: list = field(default_factory=list)


@dataclass(frozen=True)
class ThreadReducer(Reducer):
    """A Reducer whose processes are threads that share a `Meeting`."""

    meeting: Meeting | None = None

    def gather(self, tensor: Tensor) -> Tensor:
        meeting = self.meeting
        meeting.laid[self.rank] = tensor.detach().clone()
        meeting.barrier.wait(timeout=60)
        everything = torch.cat([t.reshape(-1, *tensor.shape[1:]) for t in meeting.laid])
        meeting.barrier.wait(timeout=60)
        return everything

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        self.sum_([tensor])
        return lambda: None

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            rows = self.gather(tensor.detach()[None])
            with torch.no_grad():
                tensor.copy_(rows.sum(0))


def run_ranks(world_size: int, work: Callable[[Reducer], object]) -> list:
    """What `work(reducer)` returns on each of `world_size` ranks."""
    meeting = Meeting(world_size, threading.Barrier(world_size), [None] * world_size)
    with ThreadPoolExecutor(world_size) as pool, same_attention_afterwards():
        ranks = [pool.submit(work, ThreadReducer(r, world_size, meeting=meeting)) for r in range(world_size)]
        return [rank.result(timeout=120) for rank in ranks]


@contextmanager
def same_attention_afterwards() -> Iterator[None]:
    """Attention kernels are chosen for the whole process: threads that choose in turns may leave another choice."""
    kernels = torch.backends.cuda
    before = kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled()
    yield
    kernels.enable_flash_sdp(before[0])
    kernels.enable_mem_efficient_sdp(before[1])
    kernels.enable_math_sdp(before[2])
