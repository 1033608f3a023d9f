"""The base of every backend: the plan of its batches, their device, and its number of workers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastlt.state import Batch
from loaders.cores import available_cores
from loaders.order.plan import EpochPlan
from loaders.protocol import StoredSplit
from loaders.readers import BACKENDS

WORKER_BATCHES = 2  # that each of torch's worker processes reads ahead


class BaseLoader:
    """A BatchLoader but for its batches: a subclass opens its split after this constructor, and gives `epoch`.

    num_workers: threads or processes; None takes all cores that this process may use.
    Raises ValueError for fewer workers than the backend can do with.
    """

    backend: str
    crops: bool = True
    reason: str = "asked for"
    workers_advice = "give 1 or more threads"

    def __init__(self, plan: EpochPlan, device: torch.device | str, num_workers: int | None = None) -> None:
        self.plan, self.device = plan, torch.device(device)
        self.batch_size, self.num_samples = plan.batch_size, plan.num_samples
        self.workers = default_workers() if num_workers is None else num_workers
        if self.workers < BACKENDS[self.backend].fewest_workers:
            raise ValueError(f"num_workers {num_workers} for the {self.backend!r} backend: {self.workers_advice}")
        self._labels = torch.from_numpy(plan.labels).to(self.device)

    @classmethod
    def check(cls, stored: StoredSplit, plan: EpochPlan, device: torch.device, processes: int) -> None:
        """ValueError when so many processes of this machine could not make the loader; none has filled memory yet."""

    def __len__(self) -> int:
        return self.plan.num_batches

    def epoch(self, epoch: int, first_batch: int = 0) -> Iterator[Batch]:
        """See BatchLoader."""
        raise NotImplementedError

    def close(self) -> None:
        """See BatchLoader."""
        raise NotImplementedError


def default_workers(processes: int = 1) -> int:
    """Workers for one of so many processes that share the cores which this one may use."""
    return max(1, available_cores() // processes)
