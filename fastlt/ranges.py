"""Which numbers a key of a recipe takes, stated once, in the metadata of its dataclass field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

RANGE = "range"


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`, None for no limit; `above` and `below` leave the limit itself out."""

    low: float
    high: float | None = None
    above: bool = False
    below: bool = False

    def __contains__(self, number: float) -> bool:
        if not math.isfinite(number) or number < self.low or (self.above and number == self.low):
            return False
        return self.high is None or number < self.high or (not self.below and number == self.high)

    def __str__(self) -> str:
        if self.high is None:
            return f"{'>' if self.above else '>='} {self.low}"
        if self.above or self.below:
            return f"in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"
        return f"from {self.low} to {self.high}"


def at_least(low: float) -> dict[str, Any]:
    """The metadata of a field whose number is `low` or more; of a list, each of its numbers."""
    return {RANGE: Range(low)}


def above(low: float) -> dict[str, Any]:
    """The metadata of a field whose number is larger than `low`; of a mapping, each of its numbers."""
    return {RANGE: Range(low, above=True)}


def within(low: float, high: float, *, above: bool = False, below: bool = False) -> dict[str, Any]:
    """The metadata of a field whose number lies in a range, with its ends unless `above` or `below` it."""
    return {RANGE: Range(low, high, above, below)}


def out_of_range(metadata: Mapping[str, Any], value: Any) -> Range | None:
    """The range that `value`, or one of its items, is out of; None where it is in, is None, or has no range."""
    numbers = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else [value]
    allowed = metadata.get(RANGE)
    if allowed is None or all(number in allowed for number in numbers if isinstance(number, (int, float))):
        return None
    return allowed


def check_ranges(options: Any) -> None:
    """ValueError when a number of a dataclass is out of the range of its field."""
    for field in fields(options):
        value = getattr(options, field.name)
        allowed = out_of_range(field.metadata, value)
        if allowed is not None:
            raise ValueError(f"{field.name} is {value}: give a number {allowed}")
