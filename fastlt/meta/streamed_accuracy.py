"""A_t of a meta set that is larger than memory: its images stay encoded and are decoded in the order of the slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.meta.bounded_accuracy import BoundedAccuracy
from fastlt.meta.class_accuracy import Part

# Given places in the meta set, int64 (K * n,), and n: a function of the number of a slice, which yields the images of
# this slice, of the next, and so on for ever, round after round: uint8 (n, 3, H, W) on the device.
OpenSlices = Callable[[Tensor, int], Callable[[int], Iterator[Tensor]]]


class StreamedAccuracy(BoundedAccuracy):
    """BoundedAccuracy that has the images of one slice at a time.

    open_slices: reads them, see `OpenSlices`. image_size: their side in pixels.
    What layers that are not trained make of the images is not kept: that would take a pass over all of them.
    """

    def __init__(
        self, open_slices: OpenSlices, labels: Tensor, num_classes: int, *, image_size: int, **options: Any
    ) -> None:
        self.image_size = image_size
        super().__init__(self._room, labels, num_classes, **options)
        starts = [k * len(self.labels) // self.window for k in range(self.window)]
        of_slices = torch.cat([self.mine[start : start + len(self.place)] for start in starts])
        self.slices_from = open_slices(of_slices, len(self.place))
        self.slices: Iterator[Tensor] | None = None  # where `held` and the next ones come from
        self.held = -1  # the number of the update whose slice `images` are

    def _room(self, order: Tensor) -> Tensor:
        """Memory for the images of a slice."""
        self.mine = order[self.reducer.rank :: self.reducer.world_size]
        shape = -(-len(self.mine) // self.window), 3, self.image_size, self.image_size
        return torch.zeros(shape, dtype=torch.uint8, device=order.device).contiguous(memory_format=torch.channels_last)

    def _prepared(self, prepare: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return prepare

    def _kept_outputs(self, model: nn.Module) -> None:
        return None

    def _inputs(self, part: Part) -> Tensor:
        assert isinstance(part, Tensor), "slices are scored by places"
        return super()._inputs(part - self.place[:1])

    def advice(self) -> Sequence[str]:
        return [*super().advice(), "class accuracies: the meta set stays encoded; memory has no room for its pixels"]

    def fetch(self) -> None:
        """Have the images of the next update; waits for its loader, and not for the device."""
        if self.held == self.calls or not len(self.place):
            return
        if self.slices is None or self.held + 1 != self.calls:
            self.slices = self.slices_from(self.calls)
        self.images.copy_(next(self.slices), non_blocking=True)
        self.held = self.calls

    def update(self, model: nn.Module) -> Tensor:
        # What is captured is replayed with other images: they are fetched before.
        if not (self.images.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.fetch()
        return super().update(model)

    def of(self, model: nn.Module) -> Tensor:
        """See ClassAccuracy; decodes all images."""
        calls, kept = self.calls, (self.correct.clone(), self.scored.clone())
        for number in range(self.window):
            self.calls = number
            self._go_to_place()
            self.fetch()
            self._score(model, self.place.split(self.batch_size), len(self.place))
        self.scored.fill_(1.0)
        accuracy = self.accuracy()
        self.correct.copy_(kept[0])
        self.scored.copy_(kept[1])
        self.calls = calls
        self._go_to_place()
        return accuracy
