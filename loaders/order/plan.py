"""Which images, in which order, cropped how: decided once for all backends, from (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from loaders.daemon_threads import in_background
from loaders.order.crop import CropSpec, crop_boxes, drawn_by_place, drawn_in_turn, random_resized_boxes
from loaders.order.sampling import ORDER_STREAM, epoch_order, shard, share_places, share_size
from loaders.order.shard_order import ShardOrder

AHEAD_FROM = 200_000  # images from which the next epoch is planned while this one is trained on: some 0.2 s
# Images up to which one generator draws the rectangles of an epoch, those of all processes. Above, they follow from the
# place of an image in the epoch, and a process draws its own when it comes to them.
IN_TURN = 3_000_000
CROP_STREAM = 1  # keeps the crops' random numbers apart from other uses of (seed, epoch); the last stream in use


class Boxes:
    """The crop rectangles of a process's epoch: `boxes[start:stop]` is int32 (n, 4) as (top, left, height, width).

    make: those from a start to a stop.
    """

    def __init__(self, count: int, make: Callable[[int, int], np.ndarray]) -> None:
        self.count, self.make = count, make

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self.count)
        assert step == 1, part
        return self.make(start, max(start, stop)).astype(np.int32, copy=False)


@dataclass(frozen=True)
class PlannedEpoch:
    """What is kept of the plan of an epoch.

    epoch: its number. index: int32 (n,), the positions in the split that this process visits. drawn: (n, 4), its
    rectangles, where they have been drawn.
    """

    epoch: int
    index: np.ndarray
    drawn: np.ndarray | None


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
    by_shards: how training shuffles by shards, in the place of all images at once; None for that.
    shard_starts: int64 (S,), the first image of each shard, for `by_shards`.

    Training on many images, each epoch is planned by a thread of its own during the epoch before, and the plans of both
    are held: each 4 bytes an image that this process sees, and up to `IN_TURN` images of random crops 8 more. Planning
    takes 16 bytes an image of the split at its highest, with what it makes.
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
    by_shards: ShardOrder | None = None
    shard_starts: np.ndarray | None = None
    _plans: dict[int, Future[PlannedEpoch]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
        assert self.order is None or not self.train, "training draws its order"
        if self.batch_size < 1:
            raise ValueError(f"batch size {self.batch_size}: must be at least 1")
        if self.by_shards is not None and self.sampling != "instance":
            raise ValueError(
                f"sampling {self.sampling!r} takes images from all shards at any time, and by_shards has few at hand: "
                "use 'instance', or the order of images"
            )
        if self.crop.kind == "random_resized" and not self.train:
            raise ValueError("crop kind 'random_resized' is for training: use 'center' for evaluation")
        if self._sharing["drop_last"] and self.num_samples < self.batch_size:
            raise ValueError(
                f"batch size {self.batch_size} on {self.world_size} process(es) is more than the "
                f"{self._visited} images of the split: no full batch. "
                f"Use a batch size of at most {self._visited // self.world_size}"
            )
        self.output_shape  # noqa: B018  (a mix of sizes is refused now, not in the first batch)

    @cached_property
    def output_shape(self) -> tuple[int, int]:
        """(H, W) of a cropped image."""
        return self.crop.output_shape(self.heights, self.widths)

    @cached_property
    def num_samples(self) -> int:
        """Images this process sees in one epoch."""
        return share_size(self._visited, self.rank, self.world_size, **self._sharing)

    @property
    def num_batches(self) -> int:
        """Batches this process sees in one epoch."""
        return -(-self.num_samples // self.batch_size)

    def index(self, epoch: int, first_batch: int = 0) -> np.ndarray:
        """Positions in the split, int64 (n,), this process visits from `first_batch` on; ValueError beyond the end."""
        start = self._start(first_batch)
        return self._planned(epoch).index[start:].astype(np.int64)

    def boxes(self, epoch: int, first_batch: int = 0) -> Boxes:
        """The crop rectangle of each entry of `index`."""
        return self.rectangles(self._planned(epoch), self._start(first_batch))

    def rectangles(self, planned: PlannedEpoch, first: int = 0) -> Boxes:
        """The crop rectangles of a planned epoch from image `first` of this process on."""

        def make(start: int, stop: int) -> np.ndarray:
            part = slice(first + start, first + stop)
            if planned.drawn is not None:
                return planned.drawn[part]
            images = planned.index[part]
            if self.crop.kind != "random_resized":
                return crop_boxes(self.crop, self.heights[images], self.widths[images])
            places = share_places(part.start, part.stop, self.rank, self.world_size, **self._sharing)
            draws = drawn_by_place(self._stream(planned.epoch), places)
            return random_resized_boxes(self.heights, self.widths, self.crop.scale, self.crop.aspect, draws, images)

        return Boxes(self.num_samples - first, make)

    def _planned(self, epoch: int) -> PlannedEpoch:
        """The plan of an epoch, made ahead or now; that of the next epoch is begun where it takes long."""
        for other in self._plans.keys() - {epoch, epoch + 1}:
            del self._plans[other]
        if epoch not in self._plans:
            made: Future[PlannedEpoch] = Future()
            made.set_result(self.plan_epoch(epoch))
            self._plans[epoch] = made
        planned = self._plans[epoch].result()
        if epoch + 1 not in self._plans and self.train and self._visited >= AHEAD_FROM:
            self._plans[epoch + 1] = in_background(self.plan_epoch, epoch + 1, name=f"plan-{epoch + 1}")
        return planned

    def plan_epoch(self, epoch: int) -> PlannedEpoch:
        """The order and what is drawn before the epoch begins, made now."""
        order, drawn = self._order(epoch), None
        if self.crop.kind == "random_resized" and len(order) <= IN_TURN:
            draws = drawn_in_turn(np.random.default_rng(self._stream(epoch)))
            scale, aspect = self.crop.scale, self.crop.aspect
            drawn = self._share(
                random_resized_boxes(self.heights, self.widths, scale, aspect, draws, order, self._of_sides)
            )
        return PlannedEpoch(epoch, self._share(order), drawn)

    def _stream(self, epoch: int) -> list[int]:
        return [self.seed, epoch, CROP_STREAM + self.view]

    @cached_property
    def _of_sides(self) -> np.dtype:
        """The smallest type that holds the sides of all images."""
        return np.min_scalar_type(max(int(self.heights.max()), int(self.widths.max())))

    @property
    def _sharing(self) -> dict[str, Any]:
        return {"drop_last": self.train and not self.keep_last, "batch_size": self.batch_size}

    @cached_property
    def _members(self) -> np.ndarray | None:
        """Positions of the images that are visited, in split order or in an evaluation's own; None for all of them.

        int32, or an evaluation's own int64.
        """
        if self.order is not None:
            return self.order
        return None if self.classes is None else np.flatnonzero(self.classes[self.labels]).astype(np.int32)

    @property
    def _visited(self) -> int:
        return len(self.labels if self._members is None else self._members)

    def _order(self, epoch: int) -> np.ndarray:
        """The images of an epoch, of all processes: int32."""
        if self.by_shards is not None and self.train:
            assert self.shard_starts is not None
            members = np.arange(len(self.labels), dtype=np.int32) if self._members is None else self._members
            rng = np.random.default_rng(np.random.SeedSequence([self.seed, epoch, ORDER_STREAM]))
            return self.by_shards.draw(self.shard_starts, members, self.batch_size * self.world_size, rng)
        labels = self.labels if self._members is None else self.labels[self._members]
        order = epoch_order(labels, sampling=self.sampling, seed=self.seed, epoch=epoch, shuffle=self.train)
        return order if self._members is None else self._members[order].astype(np.int32, copy=False)

    def _share(self, of_order: np.ndarray) -> np.ndarray:
        """This process's part; those of other processes are let go of."""
        return np.ascontiguousarray(shard(of_order, self.rank, self.world_size, **self._sharing))

    def _start(self, first_batch: int) -> int:
        """The place in this process's epoch at which a batch begins."""
        if not 0 <= first_batch <= self.num_batches:
            raise ValueError(
                f"cannot resume at batch {first_batch} of an epoch of {self.num_batches}: "
                "were the batch size or the number of processes changed since the checkpoint?"
            )
        return first_batch * self.batch_size
