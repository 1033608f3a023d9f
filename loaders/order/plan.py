"""Which images, in which order, cropped how: decided once for all backends, from (seed, epoch) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from loaders.order.crop import CropSpec, crop_boxes
from loaders.order.sampling import epoch_order, shard

CROP_STREAM = 1  # keeps the crops' random numbers apart from other uses of (seed, epoch); the last stream in use


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The order and the crop rectangles of every epoch of one process.

    labels, heights, widths: int64 (N,), of the split.
    train: True shuffles and drops what does not fill a batch on every process; False keeps split order and covers each
        image exactly once over the processes.
    view: plans that differ in nothing else visit the same images under other random crops.
    classes: bool (C,), the classes whose images are visited, as if the split held no others; None for all of them.
    keep_last: whether training, too, covers each image exactly once, in a smaller last batch.

    Raises ValueError when a training split does not fill one batch, or a random crop is asked for in evaluation.
    """

    labels: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    crop: CropSpec
    batch_size: int
    train: bool
    sampling: str = "instance"
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    view: int = 0
    classes: np.ndarray | None = None
    keep_last: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}: must be at least 1")
        if self.crop.kind == "random_resized" and not self.train:
            raise ValueError("crop kind 'random_resized' is for training: use 'center' for evaluation")
        if self._drop_last and self.num_samples < self.batch_size:
            raise ValueError(
                f"batch size {self.batch_size} on {self.world_size} process(es) is more than the "
                f"{len(self._members)} images of the split: no full batch. "
                f"Use a batch size of at most {len(self._members) // self.world_size}"
            )
        self.output_shape  # noqa: B018  (a mix of sizes is refused now, not in the first batch)

    @cached_property
    def output_shape(self) -> tuple[int, int]:
        """(H, W) of a cropped image."""
        return self.crop.output_shape(self.heights, self.widths)

    @cached_property
    def num_samples(self) -> int:
        """Images this process sees in one epoch."""
        return len(self._positions(len(self._order(0))))

    @property
    def num_batches(self) -> int:
        """Batches this process sees in one epoch."""
        return -(-self.num_samples // self.batch_size)

    def index(self, epoch: int, first_batch: int = 0) -> np.ndarray:
        """Positions in the split, int64 (n,), this process visits from `first_batch` on; ValueError beyond the end."""
        order = self._order(epoch)
        return order[self._from_batch(len(order), first_batch)]

    def boxes(self, epoch: int, first_batch: int = 0) -> np.ndarray:
        """The crop rectangle of each entry of `index`, int32 (n, 4) as (top, left, height, width)."""
        order = self._order(epoch)
        rng = np.random.default_rng([self.seed, epoch, CROP_STREAM + self.view])
        boxes = crop_boxes(self.crop, self.heights[order], self.widths[order], rng)
        return boxes[self._from_batch(len(order), first_batch)]

    @property
    def _drop_last(self) -> bool:
        return self.train and not self.keep_last

    @cached_property
    def _members(self) -> np.ndarray:
        """Positions of the images that are visited at all, in split order."""
        if self.classes is None:
            return np.arange(len(self.labels))
        return np.flatnonzero(self.classes[self.labels])

    def _order(self, epoch: int) -> np.ndarray:
        labels = self.labels[self._members]
        order = epoch_order(labels, sampling=self.sampling, seed=self.seed, epoch=epoch, shuffle=self.train)
        return self._members[order]

    def _positions(self, length: int) -> np.ndarray:
        places = np.arange(length, dtype=np.int64)
        return shard(places, self.rank, self.world_size, drop_last=self._drop_last, batch_size=self.batch_size)

    def _from_batch(self, length: int, first_batch: int) -> np.ndarray:
        if not 0 <= first_batch <= self.num_batches:
            raise ValueError(
                f"cannot resume at batch {first_batch} of an epoch of {self.num_batches}: "
                "were the batch size or the number of processes changed since the checkpoint?"
            )
        return self._positions(length)[first_batch * self.batch_size :]
