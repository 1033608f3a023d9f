"""Timing several ways to do one thing: in turns within one run, after a warm-up, by the median of the rounds."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastlt import strict_json
from fastlt.device.openmp import runtime

Speeds = dict[str, list[float]]


@dataclass(frozen=True)
class Row:
    """One way to do it: images a second, and how many times as fast as the two it is compared with (None: neither).

    The ratios are medians of the ratios within each round, so that what slows the machine down slows both.
    """

    name: str
    img_s: float
    ratio_bare: float | None = None
    ratio_torchvision: float | None = None


IDLE_S = 0.25  # LLVM's OpenMP threads wait awake for 0.2 s after their last work


def interleaved(variants: dict[str, Callable[[], int]], rounds: int) -> Speeds:
    """Images a second of each variant in each round; a variant does its work and returns the number of images.

    Each runs once before, unmeasured: what is compiled, started or read for the first time is no part of the speed.
    Before each, the threads of the variant before it go to sleep: an epoch of small images takes 15 ms.
    """
    for run in variants.values():
        run()
    speeds: Speeds = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            time.sleep(IDLE_S)
            started = time.perf_counter()
            images = run()
            speeds[name].append(images / (time.perf_counter() - started))
    return speeds


def row(speeds: Speeds, name: str, *, bare: str | None = None, torchvision: str | None = None, prefix: str = "") -> Row:
    """The row of one variant, compared with the variants that are named."""
    return Row(
        prefix + name, statistics.median(speeds[name]), ratio(speeds, name, bare), ratio(speeds, name, torchvision)
    )


def ratio(speeds: Speeds, name: str, other: str | None) -> float | None:
    """How many times as fast as another variant, the median over the rounds; None without one."""
    if other is None or other == name:
        return None
    return median_ratio(speeds[name], speeds[other])


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios within each round."""
    return statistics.median(a / b for a, b in zip(values, others, strict=True))


def report_speeds(rows: list[Row], *, as_json: bool, settings: dict[str, Any]) -> None:
    """`report` of images a second."""
    settings = {**settings, "openmp": runtime(), "torch": torch.__version__, "python": platform.python_version()}
    report(rows, settings, as_json=as_json, table=_print_speeds)


def report(
    rows: list[Any], settings: Mapping[str, Any], *, as_json: bool, table: Callable[[list[Any]], object]
) -> None:
    """Print the rows, dataclasses, as one JSON object with the settings, or as `table` prints them, settings below."""
    if as_json:
        print(strict_json.dumps({"rows": [asdict(one) for one in rows], "settings": settings}))
        return
    table(rows)
    print(", ".join(f"{key} {value}" for key, value in settings.items()))


def _print_speeds(rows: list[Row]) -> None:
    width = max(len(one.name) for one in rows)
    print(f"{'':{width}}  {'img/s':>10}  {'x bare':>8}  {'x torchvision':>13}")
    for one in rows:
        print(
            f"{one.name:{width}}  {one.img_s:10,.0f}  {_times(one.ratio_bare):>8}  {_times(one.ratio_torchvision):>13}"
        )


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
