"""scikit-learn's 1,797 handwritten digits, 8x8: a real data set that needs no download, for trying things out."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np

from loaders.order.longtail import class_members, largest_n_max, longtail_counts, longtail_subset
from loaders.sources.source import Source
from loaders.sources.split import ArraySplit

if TYPE_CHECKING:
    from sklearn.utils import Bunch

TEST_PER_CLASS = 40
NAMES = tuple(str(digit) for digit in range(10))
INK_LEVELS = 16  # the pixels count inked dots of a 4x4 block: 0..16


def open_digits(*, imbalance_factor: float | None, meta_per_class: int, split_seed: int) -> Source:
    """Digits as RGB 0..255: 40 test and `meta_per_class` meta images of each class are drawn, and the rest trains.

    Raises ValueError when so many images are held out that a class has none left, or the tail cannot be cut.
    """
    pixels, labels = _read()
    members = class_members(labels, 10)
    room = min(len(of_class) for of_class in members) - TEST_PER_CLASS - 1
    if not 1 <= meta_per_class <= room:
        raise ValueError(f"meta_per_class is {meta_per_class}: digits has room for 1 to {room} a class")

    drawn = [np.random.default_rng([split_seed, c]).permutation(of_class) for c, of_class in enumerate(members)]
    held = TEST_PER_CLASS + meta_per_class
    test = np.sort(np.concatenate([of_class[:TEST_PER_CLASS] for of_class in drawn]))
    meta = np.sort(np.concatenate([of_class[TEST_PER_CLASS:held] for of_class in drawn]))
    train = np.sort(np.concatenate([of_class[held:] for of_class in drawn]))
    how = f"scikit-learn load_digits, seed {split_seed}"
    tail = "all that is not held out"
    if imbalance_factor is not None:
        available = np.bincount(labels[train])
        counts = longtail_counts(largest_n_max(available, imbalance_factor), 10, imbalance_factor)
        train = train[longtail_subset(labels[train], counts)]
        tail = f"first n_c of each class not held out, n_max {counts[0]}, imbalance factor {imbalance_factor:g}"

    provenance = {
        "train": f"{how}: {tail}",
        "meta": f"{how}: {meta_per_class} a class",
        "test": f"{how}: {TEST_PER_CLASS} a class",
    }
    rows = {"train": train, "meta": meta, "test": test}
    splits = {name: ArraySplit(pixels, labels[rows[name]], rows[name], "digits", provenance[name]) for name in rows}
    return Source("digits", NAMES, splits)


def open_whole_digits() -> Source:
    """All digits as "train": no test set of them was published, each seed of `open_digits` draws its own."""
    pixels, labels = _read()
    everything = ArraySplit.whole(pixels, labels, origin="digits", provenance="scikit-learn load_digits")
    return Source("digits", NAMES, {"train": everything})


def _read() -> tuple[np.ndarray, np.ndarray]:
    """uint8 (1797, 8, 8, 3) and int64 (1797,)."""
    from sklearn.datasets import load_digits  # lazily: it takes a second, and a usage error must not

    bunch = cast("Bunch", load_digits())  # a tuple with other arguments only
    gray = np.rint(bunch.images * (255 / INK_LEVELS)).astype(np.uint8)
    return np.repeat(gray[:, :, :, None], 3, axis=3), bunch.target.astype(np.int64)
