"""A_t at a bounded cost: however large the meta set is, an iteration scores no more than so many of its images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.meta.class_accuracy import ClassAccuracy, shares


def rounds(meta_images: int, window: int, images_per_step: int | None) -> int:
    """K, the iterations in which `refresh: rolling` scores every meta image once: `window`, or more for the bound."""
    return window if images_per_step is None else max(window, -(-meta_images // images_per_step))


class BoundedAccuracy(ClassAccuracy):
    """Rolling accuracies of which no iteration scores more than `images_per_step` images, the first one included.

    Every image is scored at least once in K iterations, see `rounds`. In the first K of them an image without a result
    counts for nothing: a class without a result has the mean accuracy of the others, as a class without images has.
    With several processes each rounds its share up: there may be one image more a process.

    Which images are next stands on the device and all slices have one length, so all iterations are one captured graph.
    Slices overlap by an image where the length does not divide.
    """

    def __init__(
        self,
        images: Tensor | Callable[[Tensor], Tensor],
        labels: Tensor,
        num_classes: int,
        *,
        images_per_step: int,
        refresh: str = "rolling",
        window: int = 1,
        **options: Any,
    ) -> None:
        assert refresh == "rolling", refresh
        assert images_per_step >= 1, images_per_step
        self.meta_images, self.images_per_step = len(labels), images_per_step
        self.window = rounds(len(labels), window, images_per_step)
        super().__init__(images, labels, num_classes, refresh=refresh, window=self.window, **options)
        self.scored = torch.zeros_like(self.correct)  # 1 for images that have a result
        self.place = torch.empty(-(-len(self.labels) // self.window), dtype=torch.int64, device=self.labels.device)
        self._go_to_place()

    def _go_to_place(self) -> None:
        """Let `place` be the images that the next update scores."""
        start = self.calls % self.window * len(self.labels) // self.window
        torch.arange(start, start + len(self.place), out=self.place)

    def advice(self) -> Sequence[str]:
        scored = -(-self.meta_images // self.window)
        return [
            f"class accuracies: {scored:,} of {self.meta_images:,} meta images are scored in an iteration; no result "
            f"is older than {self.window:,} iterations"
        ]

    def update(self, model: nn.Module) -> Tensor:
        self._score(model, self.place.split(self.batch_size), len(self.place))
        self.scored[self.place] = 1.0
        self.latest.copy_(self.accuracy())
        self.advance()
        return self.latest.clone()

    def of(self, model: nn.Module) -> Tensor:
        kept = self.scored.clone()
        self.scored.fill_(1.0)
        accuracy = super().of(model)
        self.scored.copy_(kept)
        return accuracy

    def accuracy(self) -> Tensor:
        correct, scored = self._by_class(self.correct), self._by_class(self.scored)
        self.reducer.sum_([correct, scored])
        return shares(correct, scored, scored == 0)

    def variant(self) -> None:
        return None

    def set_counters(self, counters: tuple[int, bool, bool]) -> None:
        super().set_counters(counters)
        self._go_to_place()

    def advance(self) -> None:
        super().advance()
        self._go_to_place()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "scored": self.scored.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.scored.copy_(state["scored"])
        self._go_to_place()


def class_accuracy(
    images: Tensor | Callable[[Tensor], Tensor],
    labels: Tensor,
    num_classes: int,
    *,
    images_per_step: int | None = None,
    **options: Any,
) -> ClassAccuracy:
    """A ClassAccuracy with these options, or where `images_per_step` is given, a BoundedAccuracy."""
    if images_per_step is None:
        return ClassAccuracy(images, labels, num_classes, **options)
    return BoundedAccuracy(images, labels, num_classes, images_per_step=images_per_step, **options)
