"""Tensors that never change: made once, then kept on the device.

Making one anew would cost an operation in every batch, and the host a wait for the device where values go there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

# Nothing is ever dropped: a captured graph reads what it was captured with.
KEPT: dict[Hashable, Any] = {}


def kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """`make`, called once for each set of its arguments, which are positional and hashable; what it gave is kept."""

    @functools.wraps(make)
    def get(*arguments: Hashable) -> Made:
        key = (make, arguments)
        if key not in KEPT:
            # Outlives the caller's context, so it must not become an inference tensor when evaluation is the first.
            with torch.inference_mode(False):
                KEPT[key] = make(*arguments)
        return KEPT[key]

    return get


@kept
def number(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-d tensor."""
    return torch.full((), value, dtype=dtype, device=device)


def as_divisor(value: float, like: Tensor) -> Tensor:
    """A number as a 0-d tensor of `like`'s type, to divide by: a GPU takes a tensor over a number times its reciprocal,
    which rounds differently from a division, so that pixels would not be a CPU's.
    """
    return number(value, like.dtype, like.device)


def whole_numbers(largest: int) -> torch.dtype:
    """float32 if it holds every whole number up to `largest`, so that their sums are exact in any order; or float64."""
    return torch.float32 if largest <= 1 << 24 else torch.float64
