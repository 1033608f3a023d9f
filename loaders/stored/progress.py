"""A progress bar with images a second and the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(title: str, total: int, enabled: bool, unit: str = "img") -> Iterator[Callable[[int], object]]:
    """A function that takes the number of images (or bytes, "B") done since its last call, and shows it."""
    scaled = unit == "B"
    with tqdm(total=total, desc=title, unit=unit, unit_scale=scaled, disable=not enabled, dynamic_ncols=True) as bar:
        yield bar.update
