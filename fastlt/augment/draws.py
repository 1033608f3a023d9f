"""Random choices: drawn on the host, sent to the device without waiting for it.

Every augmentation first draws its choices on the host (small tensors, one row an image) and then applies them on the
device. Nothing comes back from the device, so nothing waits; and since the host knows which image gets what, it can
group images by operation, which is what makes a batched policy cheap on a CPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlt.state import upload

DrawsT = TypeVar("DrawsT")


@dataclass(frozen=True)
class Rows:
    """The images of a batch that one operation is for, in one of two forms.

    static: False for grouped work: `chosen` is int64 (K,), and only these K images are computed. K differs from batch
        to batch. True for work of static shape: `chosen` is bool (N,), all N are computed and the others are put back,
        as a graph needs it.
    """

    chosen: Tensor
    static: bool

    @classmethod
    def of(cls, chosen: Tensor, static: bool) -> Rows:
        """chosen: bool (N,), on the host."""
        return cls(chosen if static else torch.nonzero(chosen).flatten(), static)

    @property
    def empty(self) -> bool:
        """True when it is known on the host that there is nothing to do; never where the shape is static."""
        return not self.static and self.chosen.numel() == 0

    def take(self, values: Tensor) -> Tensor:
        """values: (N, ...). Returns those of the chosen rows (K, ...), or all of them where the shape is static."""
        return values if self.static else values.index_select(0, self.chosen)

    def put(self, base: Tensor, values: Tensor) -> Tensor:
        """`base` (N, ...) with the chosen rows replaced by `values`, which are what `take` gave, transformed."""
        if self.static:
            return torch.where(self.chosen.view(-1, *[1] * (base.ndim - 1)), values, base)
        # Whole rows are copied: two thirds of the time of writing into the places of a copy.
        source = torch.arange(len(base), device=base.device)
        source[self.chosen] = torch.arange(len(base), len(base) + len(values), device=base.device)
        return torch.cat((base, values)).index_select(0, source)


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


ALIGNED = 16  # bytes, more than any element has


def map_tensors(draws: DrawsT, change: Callable[[Tensor], Tensor]) -> DrawsT:
    """The same structure with every tensor changed; `change` is called in the order in which the tensors stand there.

    draws: tensors, in any nesting of dataclasses, dicts, lists and tuples.
    """

    def mapped(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {field.name: mapped(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        if isinstance(value, dict):
            return {name: mapped(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(mapped(part) for part in value)
        return value

    return mapped(draws)


def upload_draws(draws: DrawsT, device: torch.device) -> DrawsT:
    """Everything in `draws` on `device`."""
    return map_tensors(draws, lambda tensor: upload(tensor, device))


class HeldDraws:
    """Draws on a device in memory that stays the same, to be overwritten by those of the next batch.

    draws: of one batch, one entry an operation, of static shape; copied. They lie in one block, so that overwriting is
    one copy from the host: a batch has dozens of small tensors, and a copy of each would cost more than drawing them.
    """

    def __init__(self, draws: Sequence[object], device: torch.device) -> None:
        self.layout = [(tensor.dtype, tensor.shape) for tensor in _tensors(draws)]
        sizes = [dtype.itemsize * shape.numel() for dtype, shape in self.layout]
        aligned = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        *self.starts, total = itertools.accumulate(aligned, initial=0)
        self.block = torch.empty(total, dtype=torch.uint8, device=device)
        views = iter(self._views(self.block))
        self.draws = map_tensors(draws, lambda _: next(views))
        self.overwrite(draws)

    def overwrite(self, draws: Sequence[object]) -> None:
        """Put draws of the same names, shapes and types into their place, without a wait for the device."""
        tensors = _tensors(draws)
        assert [(tensor.dtype, tensor.shape) for tensor in tensors] == self.layout, "draws differ from batch to batch"
        if not tensors:
            return
        # New for each batch: pinned memory is not given out again before the copies from it are done.
        host = torch.empty(self.block.shape, dtype=torch.uint8, pin_memory=self.block.device.type == "cuda")
        for place, tensor in zip(self._views(host), tensors, strict=True):
            place.copy_(tensor)
        self.block.copy_(host, non_blocking=True)

    def _views(self, block: Tensor) -> list[Tensor]:
        """The tensors that lie in a block."""
        return [
            block[start : start + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for start, (dtype, shape) in zip(self.starts, self.layout, strict=True)
        ]


def _tensors(draws: Sequence[object]) -> list[Tensor]:
    """All tensors of `draws`, in the order of `map_tensors`."""
    found: list[Tensor] = []

    def find(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(draws, find)
    return found


def uniform(count: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """float64 (count,), uniform in [low, high)."""
    return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)


def integers(count: int, high: int, generator: torch.Generator) -> Tensor:
    """int64 (count,), uniform in [0, high)."""
    return torch.randint(high, (count,), generator=generator)


def chance(count: int, p: float, generator: torch.Generator) -> Tensor:
    """bool (count,), each True with probability `p`; always the same number of draws, whatever `p` is."""
    return torch.rand(count, generator=generator, dtype=torch.float64) < p
