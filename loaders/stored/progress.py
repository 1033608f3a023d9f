"""Progress bars with images a second and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

TOTAL_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n:,.0f}/{total:,.0f} img [{elapsed}, {remaining} left, {rate_fmt}]"


@contextmanager
def progress_bar(title: str, total: int, enabled: bool, unit: str = "img") -> Iterator[Callable[[int], object]]:
    """A function that takes the number of images (or bytes, "B") done since its last call, and shows it."""
    scaled = unit == "B"
    with tqdm(total=total, desc=title, unit=unit, unit_scale=scaled, disable=not enabled, dynamic_ncols=True) as bar:
        yield bar.update


class TotalProgress:
    """One bar over all parts of a conversion of `count` images: an image is done when all parts have had it."""

    def __init__(self, count: int, bar: tqdm) -> None:
        self._count, self._bar = count, bar

    def phase(self, name: str, share: float, total: int) -> Callable[[int], object]:
        """Begin a part; a function that takes how many of its `total` units are done since its last call.

        share: of the part in the time of all.
        """
        self._bar.set_description_str(f"convert: {name}")
        step = share * self._count / max(total, 1)
        # Sums of parts are rounded: the bar would be told more than there is.
        return lambda units: self._bar.update(min(units * step, self._count - self._bar.n))

    def done_before(self, share: float, images: int) -> None:
        """Count images that took no time of this run: the rate is that of the others."""
        if self._bar.disable:
            return
        skipped = share * images
        self._bar.initial += skipped
        self._bar.last_print_n += skipped
        self._bar.n += skipped
        self._bar.refresh()


@contextmanager
def total_progress(count: int, enabled: bool) -> Iterator[TotalProgress]:
    """A `TotalProgress` that is shown while the work goes on."""
    with tqdm(
        total=count, desc="convert", unit="img", bar_format=TOTAL_FORMAT, disable=not enabled, dynamic_ncols=True
    ) as bar:
        yield TotalProgress(count, bar)
