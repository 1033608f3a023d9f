"""Which images, in which order, cropped how: decided once for all backends, from (seed, epoch) alone."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from loaders.order.crop import CropSpec, crop_boxes
from loaders.order.sampling import epoch_order, shard

AHEAD_FROM = 200_000  # images from which the next epoch is planned while this one is trained on: some 0.2 s
# Images up to which one stream gives the rectangles of an epoch. Above, each block of the order has its own: drawing
# takes some 200 bytes an image, and 14 million at once would take 3 GB.
ONE_STREAM, BLOCK = 3_000_000, 1 << 20
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
    order: int64 (n,), the positions that an evaluation visits over all processes, in this order and as often as each is
        there; None for all of them in split order.

    Training on many images, each epoch is planned by a thread of its own during the epoch before, and the plans of both
    are held: 24 bytes an image that this process sees, each.
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
    order: np.ndarray | None = None
    _ahead: dict[int, _Planning] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        assert self.order is None or not self.train, "training draws its order"
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
        return len(self._positions(len(self._members)))

    @property
    def num_batches(self) -> int:
        """Batches this process sees in one epoch."""
        return -(-self.num_samples // self.batch_size)

    def index(self, epoch: int, first_batch: int = 0) -> np.ndarray:
        """Positions in the split, int64 (n,), this process visits from `first_batch` on; ValueError beyond the end."""
        start = self._start(first_batch)
        if self._plans_ahead:
            return self._planned(epoch)[0][start:]
        order = self._order(epoch)
        return order[self._positions(len(order))[start:]]

    def boxes(self, epoch: int, first_batch: int = 0) -> np.ndarray:
        """The crop rectangle of each entry of `index`, int32 (n, 4) as (top, left, height, width)."""
        start = self._start(first_batch)
        if self._plans_ahead:
            return self._planned(epoch)[1][start:]
        order = self._order(epoch)
        return self._boxes(epoch, order)[self._positions(len(order))[start:]]

    @property
    def _plans_ahead(self) -> bool:
        return self.train and len(self._members) >= AHEAD_FROM

    def _planned(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Index and boxes of an epoch, as they were planned ahead, or now; the next epoch is planned from here on."""
        for other in self._ahead.keys() - {epoch, epoch + 1}:
            del self._ahead[other]
        if epoch not in self._ahead:
            self._ahead[epoch] = _Planning(self, epoch)
        made = self._ahead[epoch].result()
        if epoch + 1 not in self._ahead:
            self._ahead[epoch + 1] = _Planning(self, epoch + 1)
        return made

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = self._order(epoch)
        places = self._positions(len(order))
        return order[places], self._boxes(epoch, order)[places]

    def _boxes(self, epoch: int, order: np.ndarray) -> np.ndarray:
        """The rectangles of an epoch's images in order, of all processes."""
        stream = [self.seed, epoch, CROP_STREAM + self.view]
        if len(order) <= ONE_STREAM:
            return self._drawn(order, stream)
        starts = range(0, len(order), BLOCK)
        boxes = np.empty((len(order), 4), dtype=np.int32)
        for block, start in enumerate(starts):
            boxes[start : start + BLOCK] = self._drawn(order[start : start + BLOCK], [*stream, block])
        return boxes

    def _drawn(self, images: np.ndarray, stream: list[int]) -> np.ndarray:
        return crop_boxes(self.crop, self.heights[images], self.widths[images], np.random.default_rng(stream))

    @property
    def _drop_last(self) -> bool:
        return self.train and not self.keep_last

    @cached_property
    def _members(self) -> np.ndarray:
        """Positions of the images that are visited at all, in split order, or in the order of an evaluation's own."""
        if self.order is not None:
            return self.order
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

    def _start(self, first_batch: int) -> int:
        """The place in this process's epoch at which a batch begins."""
        if not 0 <= first_batch <= self.num_batches:
            raise ValueError(
                f"cannot resume at batch {first_batch} of an epoch of {self.num_batches}: "
                "were the batch size or the number of processes changed since the checkpoint?"
            )
        return first_batch * self.batch_size


class _Planning:
    """The plan of an epoch, made by a thread that ends with the process. NumPy leaves the interpreter's lock alone."""

    def __init__(self, plan: EpochPlan, epoch: int) -> None:
        self._plan, self._epoch = plan, epoch
        self._made: tuple[np.ndarray, np.ndarray] | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"plan-{epoch}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._made = self._plan._plan(self._epoch)
        except BaseException as error:  # raised where the plan is asked for
            self._error = error

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Index and boxes; waits for them. Raises what planning raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._made is not None
        return self._made
