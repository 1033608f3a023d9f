"""Random choices: drawn on the host, sent to the device without waiting for it.

Every augmentation first draws its choices on the host (small tensors, one row an image) and then applies them on the
device. Nothing comes back from the device, so nothing waits; and since the host knows which image gets what, it can
group images by operation, which is what makes a batched policy cheap on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor

from fastlt.state import upload


@dataclass(frozen=True)
class Rows:
    """The images of a batch that one operation is for, in one of two forms.

    index: int64 (K,), for grouped work: only these K images are computed. K differs from batch to batch.
    mask: bool (N,), for work of static shape: all N are computed and the others are put back, as a graph needs it.
    """

    index: Tensor | None = None
    mask: Tensor | None = None

    @classmethod
    def of(cls, chosen: Tensor, static: bool) -> Rows:
        """chosen: bool (N,), on the host."""
        return cls(mask=chosen) if static else cls(index=torch.nonzero(chosen).flatten())

    @property
    def empty(self) -> bool:
        """True when it is known on the host that there is nothing to do; a mask never says so."""
        return self.index is not None and self.index.numel() == 0

    def take(self, values: Tensor) -> Tensor:
        """values: (N, ...). Returns those of the chosen rows (K, ...), or all of them where the shape is static."""
        return values if self.index is None else values.index_select(0, self.index)

    def put(self, base: Tensor, values: Tensor) -> Tensor:
        """`base` (N, ...) with the chosen rows replaced by `values`, which are what `take` gave, transformed."""
        if self.index is not None:
            # Whole rows are copied: two thirds of the time of writing into the places of a copy.
            source = torch.arange(len(base), device=base.device)
            source[self.index] = torch.arange(len(base), len(base) + len(values), device=base.device)
            return torch.cat((base, values)).index_select(0, source)
        return torch.where(self.mask.view(-1, *[1] * (base.ndim - 1)), values, base)


@dataclass(frozen=True)
class Span:
    """Neighbouring images of a batch that one kind of work is for, in one of two forms.

    bounds: (start, stop), for grouped work: of images put into the order of the work they get, in memory of their own.
    None: all images, for work of static shape, whose parameters change nothing of those that it is not for.
    """

    bounds: tuple[int, int] | None = None

    @property
    def empty(self) -> bool:
        """True when there is nothing to do."""
        return self.bounds is not None and self.bounds[0] == self.bounds[1]

    def take(self, values: Tensor) -> Tensor:
        """A view of these rows of `values` (N, ...)."""
        return values if self.bounds is None else values[self.bounds[0] : self.bounds[1]]

    def put(self, base: Tensor, values: Tensor) -> Tensor:
        """`base` (N, ...) with these rows replaced by `values`: written there, or simply `values` where it is all."""
        if self.bounds is None:
            return values
        self.take(base).copy_(values)
        return base

    def within(self, outer: Span) -> Span:
        """The same images, counted among those of another span that has them all."""
        if self.bounds is None or outer.bounds is None:
            return self
        start, stop = self.bounds
        return Span((start - outer.bounds[0], stop - outer.bounds[0]))


# The choices of one operation for one batch, by name; nested where an operation has several turns.
Draws = Mapping[str, Union[Tensor, Rows, Span, "Draws"]]

ALIGNED = 16  # bytes, more than any element has


def upload_draws(draws: Draws, device: torch.device) -> Draws:
    """Everything in `draws` on `device`."""
    return {name: _upload_one(value, device) for name, value in draws.items()}


def _upload_one(value: Tensor | Rows | Span | Draws, device: torch.device) -> Tensor | Rows | Span | Draws:
    if isinstance(value, Mapping):
        return upload_draws(value, device)
    if isinstance(value, Span):
        return value
    if isinstance(value, Rows):
        parts = (None if part is None else upload(part, device) for part in (value.index, value.mask))
        return Rows(*parts)
    return upload(value, device)


class HeldDraws:
    """Draws on a device in memory that stays the same, to be overwritten by those of the next batch.

    draws: of one batch, one entry an operation, of static shape; copied. They lie in one block, so that overwriting is
    one copy from the host: a batch has dozens of small tensors, and a copy of each would cost more than drawing them.
    """

    def __init__(self, draws: Sequence[Draws], device: torch.device) -> None:
        self.layout = [(tensor.dtype, tensor.shape) for tensor in _leaves(draws)]
        sizes = [dtype.itemsize * shape.numel() for dtype, shape in self.layout]
        aligned = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        *self.starts, total = itertools.accumulate(aligned, initial=0)
        self.block = torch.empty(total, dtype=torch.uint8, device=device)
        self.draws: list[Draws] = _with_leaves(draws, iter(self._views(self.block)))
        self.overwrite(draws)

    def overwrite(self, draws: Sequence[Draws]) -> None:
        """Put draws of the same names, shapes and types into their place, without a wait for the device."""
        leaves = list(_leaves(draws))
        assert [(tensor.dtype, tensor.shape) for tensor in leaves] == self.layout, "draws differ from batch to batch"
        # New for each batch: pinned memory is not given out again before the copies from it are done.
        host = torch.empty(self.block.shape, dtype=torch.uint8, pin_memory=self.block.device.type == "cuda")
        for place, tensor in zip(self._views(host), leaves, strict=True):
            place.copy_(tensor)
        self.block.copy_(host, non_blocking=True)

    def _views(self, block: Tensor) -> list[Tensor]:
        """The tensors that lie in a block."""
        return [
            block[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for start, (dtype, shape) in zip(self.starts, self.layout, strict=True)
        ]


def _leaves(draws: Draws | Sequence[Draws]) -> Iterator[Tensor]:
    """All tensors, in the order in which they stand there."""
    for value in draws.values() if isinstance(draws, Mapping) else draws:
        if isinstance(value, Mapping):
            yield from _leaves(value)
        elif isinstance(value, Rows):
            assert value.index is None, "the number of rows differs from batch to batch"
            yield value.mask
        elif isinstance(value, Tensor):
            yield value
        # A span says the same of every batch where shapes are static.


def _with_leaves(draws: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with other tensors."""
    if isinstance(draws, Mapping):
        return {name: _with_leaves(value, tensors) for name, value in draws.items()}
    if isinstance(draws, Sequence):
        return [_with_leaves(value, tensors) for value in draws]
    if isinstance(draws, Span):
        return draws
    return Rows(mask=next(tensors)) if isinstance(draws, Rows) else next(tensors)


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """float64 (count,), uniform in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def integers(count: int, high: int, generator: torch.Generator) -> Tensor:
    """int64 (count,), uniform in [0, high)."""
    return torch.randint(high, (count,), generator=generator)


def chance(count: int, p: float, generator: torch.Generator) -> Tensor:
    """bool (count,), each True with probability `p`; always the same number of draws, whatever `p` is."""
    return torch.rand(count, generator=generator, dtype=torch.float64) < p
