"""The types that pass between packages: the batch of a loader, the output of a step, the class counts; and `upload`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fastlt.names import shortened
from fastlt.ranges import at_least


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`, without a wait for what the device is doing.

    On the way to a GPU it is pinned: a copy from other memory would begin when all earlier work is done. What is there
    already stays what it is: only a host's memory can be pinned.
    """
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # Contiguous, for pinning keeps gaps, and a tensor with gaps is copied by way of pageable memory.
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Batch:
    """One mini-batch as every loader backend delivers it, on the training device.

    images: uint8 (N, 3, H, W) in channels_last memory, RGB, 0..255, not normalised.
    labels: int64 (N,), in [0, C).
    index: int64 (N,), each image's position in its converted split; evaluation removes duplicates by it.
    second_crop: the same images under a second random crop, like `images`; None except in the training batches of
        methods with two views, where the loader does the cropping.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    second_crop: Tensor | None = None

    def __len__(self) -> int:
        return self.labels.shape[0]


@dataclass(frozen=True)
class ShotRanks:
    """Many-, medium- and few-shot groups by rank, where no thresholds on the counts give the groups of a publication.

    ranks: how many classes are many-, medium- and few-shot, the largest classes first; of equal ones the lower label.
    """

    ranks: tuple[int, int, int] = field(metadata=at_least(0))


@dataclass(frozen=True)
class ClassCounts:
    """Training images per class, the many/medium/few groups, and the class names.

    counts: int64 (C,), each >= 1.
    shots: (upper, lower); a class is many-shot with more than `upper` images, few-shot with fewer than `lower`,
        medium-shot otherwise (the convention of the Difficulty-Net paper is (100, 20)). Or groups by rank, C in all.
    names: C class names, in label order.
    """

    counts: np.ndarray
    names: tuple[str, ...]
    shots: tuple[int, int] | ShotRanks = (100, 20)

    def __post_init__(self) -> None:
        assert self.counts.ndim == 1, self.counts.shape
        assert self.counts.dtype == np.int64, self.counts.dtype
        assert len(self.names) == len(self.counts)

    @classmethod
    def of(
        cls,
        counts: Sequence[int] | np.ndarray | Tensor,
        names: Sequence[str] | None = None,
        shots: tuple[int, int] | ShotRanks = (100, 20),
    ) -> ClassCounts:
        """The counts of any sequence of whole numbers, by label; names: by default the labels.

        ValueError for a class without an image.
        """
        array = np.asarray(counts, dtype=np.int64)
        if array.ndim != 1 or not len(array) or array.min() < 1:
            raise ValueError(f"class counts are one number a class, each of 1 or more; these are {shortened(counts)}")
        return cls(array, tuple(names or map(str, range(len(array)))), shots)

    @property
    def num_classes(self) -> int:
        return len(self.counts)

    @property
    def shots_text(self) -> str:
        """The groups as a recipe writes them."""
        return f"{{ranks: {list(self.shots.ranks)}}}" if isinstance(self.shots, ShotRanks) else str(list(self.shots))

    @property
    def imbalance_factor(self) -> float:
        """Largest over smallest class."""
        return float(self.counts.max() / self.counts.min())

    def shot_masks(self) -> dict[str, np.ndarray]:
        """bool (C,) masks by the name of the group; together they cover every class exactly once."""
        if isinstance(self.shots, ShotRanks):
            many, few = (np.zeros(self.num_classes, dtype=bool) for _ in range(2))
            by_rank = np.argsort(-self.counts, kind="stable")
            many[by_rank[: self.shots.ranks[0]]] = True
            few[by_rank[sum(self.shots.ranks[:2]) :]] = True
            return {"many": many, "medium": ~(many | few), "few": few}
        upper, lower = self.shots
        many, few = self.counts > upper, self.counts < lower
        return {"many": many, "medium": ~(many | few), "few": few}


@dataclass(frozen=True)
class StepOutput:
    """What one training iteration reports: 0-d device tensors, so that nothing waits for the device.

    loss: the objective that was minimised, 0-d float32.
    metrics: further 0-d tensors by name, for the log.
    per_class: (C,) tensors by name (weight, meta_accuracy), for the log of how the classes fare.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    per_class: dict[str, Tensor] = field(default_factory=dict)
