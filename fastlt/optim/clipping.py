"""Clipping of gradients, by timm's functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from timm.utils import dispatch_clip_grad
from torch import Tensor

from fastlt.ranges import above, check_ranges


@dataclass(frozen=True)
class Clip:
    """How gradients are clipped before the optimizer's step; exactly one is given.

    norm: the largest norm of all gradients together.
    value: the largest size of a single number.
    agc: the largest norm of a unit's gradient over that of its weights (adaptive gradient clipping, Brock et al. 2021);
        the head's are not clipped.
    """

    norm: float | None = field(default=None, metadata=above(0))
    value: float | None = field(default=None, metadata=above(0))
    agc: float | None = field(default=None, metadata=above(0))

    def __post_init__(self) -> None:
        check_ranges(self)
        given = [f.name for f in fields(self) if getattr(self, f.name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"clip has {' and '.join(given) or 'none'} of norm, value and agc; give exactly one, or clip: null"
            )

    def __call__(self, parameters: Sequence[Tensor], head: Sequence[Tensor]) -> None:
        """Clip `grad` of the parameters in place, those of `head` among them; waits for nothing."""
        ((mode, limit),) = [(name, value) for name, value in vars(self).items() if value is not None]
        spared = set(head) if mode == "agc" else set()
        dispatch_clip_grad([p for p in parameters if p not in spared], limit, mode=mode)

    def factors(
        self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], head: Sequence[Tensor]
    ) -> list[Tensor]:
        """What clipping would multiply each number of these gradients by; changes nothing and waits for nothing."""
        views = [p.detach() for p in parameters]
        for view, gradient in zip(views, gradients, strict=True):
            view.grad = gradient.clone()
        heads = set(head)
        self(views, [view for view, parameter in zip(views, parameters, strict=True) if parameter in heads])
        return [
            torch.ones_like(g) if view.grad is None else torch.where(g == 0, 1.0, view.grad / g)
            for view, g in zip(views, gradients, strict=True)
        ]
