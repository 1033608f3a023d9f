"""The long-tailed orders of an epoch as a sampler of torch, for a DataLoader of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from fastlt.names import pick
from loaders.order.sampling import SAMPLINGS, epoch_order


class EpochSampler(Sampler[int]):
    """Positions of the images of an epoch, as many as there are; every pass over it is the next epoch."""

    def __init__(self, labels: np.ndarray, sampling: str, seed: int) -> None:
        self.labels, self.sampling, self.seed = labels, sampling, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of `epoch`, counted from 0: for a run that goes on."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.labels, sampling=self.sampling, seed=self.seed, epoch=self.epoch)
        self.epoch += 1
        return iter(order.tolist())

    def __len__(self) -> int:
        return len(self.labels)


def build_sampler(sampling: str, labels: Sequence[int] | np.ndarray | Tensor, *, seed: int = 0) -> EpochSampler:
    """A sampler for `torch.utils.data.DataLoader(..., sampler=...)`.

    sampling: "instance", "class_balanced", "effective_number" or "class_aware_4", see `epoch_order`.
    labels: whole numbers (N,), of the data set in its order. seed: with the epoch it decides the order.
    ValueError for another sampling.
    """
    pick("sampling", sampling, SAMPLINGS)
    return EpochSampler(np.asarray(labels, dtype=np.int64), sampling, seed)
