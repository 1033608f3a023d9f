"""Learning rates as pure functions of the position in a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

SCHEDULES = ("constant", "cosine", "multistep")


def learning_rate(
    position: float,
    *,
    length: float,
    lr: float,
    schedule: str,
    warmup: float = 0.0,
    warmup_from: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
    min_lr: float = 0.0,
) -> float:
    """The learning rate at `position` of a stage; position, length, warmup and milestones are in one unit.

    warmup: over this length the rate goes linearly from `warmup_from` to `lr`; cosine decay starts after it and ends
    at `min_lr`, multistep multiplies by `gamma` from each milestone on.
    """
    assert schedule in SCHEDULES, schedule
    if position < warmup:
        return warmup_from + (lr - warmup_from) * position / warmup
    if schedule == "cosine":
        return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * (position - warmup) / (length - warmup)))
    if schedule == "multistep":
        return lr * gamma ** sum(position >= m for m in milestones)
    return lr
