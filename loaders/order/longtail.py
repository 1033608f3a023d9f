"""How a long tail is cut out of a data set: counts per class, the two CIFAR-LT conventions, held-out images.

Every function is pure arithmetic on label arrays; what it returns are positions into the array it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastlt.names import pick

LDAM_SEED = 0  # np.random.seed(0) of the LDAM release: the subsets most published CIFAR-LT tables were trained on


@dataclass(frozen=True)
class LongTail:
    """A training set and the held-out images that steer it.

    train, meta: int64 positions in file order.
    provenance: how they were chosen, one line.
    """

    train: np.ndarray
    meta: np.ndarray
    provenance: str

    @property
    def num_shared(self) -> int:
        """Meta images that are training images as well (only the ldam convention has any)."""
        return len(np.intersect1d(self.train, self.meta))


def longtail_counts(n_max: int, num_classes: int, imbalance_factor: float) -> np.ndarray:
    """Images per class of an exponential long tail: `n_c = int(n_max * IF^(-c / (C-1)))`.

    Returns int64 (C,), falling from n_max to n_max / IF. Raises ValueError when the last class would be left empty.
    Source: Cui et al. 2019, section 5.1; LDAM's `get_img_num_per_cls`.
    """
    if not imbalance_factor >= 1:
        raise ValueError(f"imbalance_factor is {imbalance_factor}: it must be 1 (balanced) or larger")
    assert num_classes >= 1
    share = _shares(num_classes, imbalance_factor)
    counts = _floor(n_max * share)
    if counts[-1] < 1:
        raise ValueError(
            f"imbalance_factor {imbalance_factor:g} leaves the last of {num_classes} classes without an image, the "
            f"first has {n_max}: it can be at most {n_max}"
        )
    return counts


def largest_n_max(available: np.ndarray, imbalance_factor: float) -> int:
    """The largest n_max for which class c has the images that `longtail_counts` asks of it.

    available: int64 (C,), images there are. For CIFAR this is the class size, 500 or 5000, less what is held out.
    """
    share = _shares(len(available), imbalance_factor)
    n_max = int(np.ceil((available + 1) / share).min())
    while n_max > 0 and (_floor(n_max * share) > available).any():
        n_max -= 1
    return n_max


def _shares(num_classes: int, imbalance_factor: float) -> np.ndarray:
    return float(imbalance_factor) ** (-np.arange(num_classes) / max(num_classes - 1, 1))


def _floor(values: np.ndarray) -> np.ndarray:
    # 49 * 49**-1.0 is 0.9999999999999999: what is an integer but for rounding must not lose an image.
    return np.floor(values * (1 + 1e-12)).astype(np.int64)


def class_members(labels: np.ndarray, num_classes: int) -> list[np.ndarray]:
    """Positions of each class's images, in file order: C arrays of int64."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def longtail_subset(labels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Positions of the first `counts[c]` images of each class, in file order: int64 (sum of counts,)."""
    members = class_members(labels, len(counts))
    firsts = [_first(of_class, n, c) for c, (of_class, n) in enumerate(zip(members, counts, strict=True))]
    return np.sort(np.concatenate(firsts))


def _first(members: np.ndarray, n: int, c: int) -> np.ndarray:
    if len(members) < n:
        raise ValueError(f"class {c} has {len(members)} images, {n} are wanted")
    return members[:n]


def holdout_per_class(
    labels: np.ndarray, per_class: int, class_names: Sequence[object]
) -> tuple[np.ndarray, np.ndarray]:
    """Hold the last `per_class` images of each class (file order) out: (held, rest), int64 positions in file order.

    Raises ValueError when a class would be left without an image.
    """
    if per_class < 1:
        raise ValueError(f"meta_per_class is {per_class}: it must be at least 1")
    members = class_members(labels, len(class_names))
    small = [c for c, of_class in enumerate(members) if len(of_class) <= per_class]
    if small:
        raise ValueError(
            f"{len(small)} of {len(class_names)} classes have no more than {per_class} images, so holding {per_class} "
            f"out for validation leaves none to train on (class {class_names[small[0]]} has {len(members[small[0]])}): "
            "hold out fewer (--meta-per-class) or a share of each class (--split 0.9/0.1/0), or bring a validation set"
        )
    held = np.sort(np.concatenate([of_class[-per_class:] for of_class in members]))
    return held, np.setdiff1d(np.arange(len(labels)), held)


def subsample(labels: np.ndarray, imbalance_factor: float | None, num_classes: int) -> np.ndarray:
    """Cut a long tail out of an existing training set: int64 positions, in file order.

    The classes keep their rank: the most frequent one becomes the head (ties by label), each class keeps the first of
    its images, and n_max is the largest that every class can follow. None takes everything.
    """
    if imbalance_factor is None:
        return np.arange(len(labels))
    available = np.bincount(labels, minlength=num_classes)
    rank = np.argsort(-available, kind="stable")
    counts = np.zeros(num_classes, dtype=np.int64)
    counts[rank] = longtail_counts(largest_n_max(available[rank], imbalance_factor), num_classes, imbalance_factor)
    return longtail_subset(labels, counts)


def paper_convention(labels: np.ndarray, imbalance_factor: float, meta_per_class: int, num_classes: int) -> LongTail:
    """The last `meta_per_class` images of each class are the meta set, then the first n_c of the rest train.

    n_max is 490 for CIFAR-100 and 4990 for CIFAR-10. Source: Difficulty-Net, supplement, section 1.1 and Table 5.
    """
    meta, rest = holdout_per_class(labels, meta_per_class, range(num_classes))
    available = np.bincount(labels[rest], minlength=num_classes)
    counts = longtail_counts(largest_n_max(available, imbalance_factor), num_classes, imbalance_factor)
    train = rest[longtail_subset(labels[rest], counts)]
    return LongTail(
        train,
        meta,
        f"paper convention: meta = last {meta_per_class} images of each class in file order, train = first n_c of the "
        f"rest, n_max {counts[0]}, imbalance factor {imbalance_factor:g}",
    )


def ldam_convention(labels: np.ndarray, imbalance_factor: float, meta_per_class: int, num_classes: int) -> LongTail:
    """The first n_c of each class after the LDAM release's seeded shuffle train, n_max is the whole class.

    LDAM holds nothing out, so its head class uses every image. The meta set is the last `meta_per_class` of each
    class's shuffled order: images that are not trained on, except in the largest classes, whose meta images stay
    training images too, because the published counts must hold. `LongTail.num_shared` counts them.
    Source: Cao et al. 2019 (LDAM), `imbalance_cifar.py`.
    """
    available = np.bincount(labels, minlength=num_classes)
    if meta_per_class < 1 or meta_per_class > available.min():
        raise ValueError(f"meta_per_class is {meta_per_class}: it must be 1 to {available.min()}, the smallest class")
    counts = longtail_counts(largest_n_max(available, imbalance_factor), num_classes, imbalance_factor)
    generator = np.random.RandomState(LDAM_SEED)  # the legacy generator: np.random.seed(0) must give the same subsets
    train, meta = [], []
    for of_class, n in zip(class_members(labels, num_classes), counts, strict=True):
        generator.shuffle(of_class)
        train.append(of_class[:n])
        meta.append(of_class[-meta_per_class:])
    tail = LongTail(np.sort(np.concatenate(train)), np.sort(np.concatenate(meta)), "")
    return LongTail(
        tail.train,
        tail.meta,
        f"ldam convention: train = first n_c of each class after np.random.seed({LDAM_SEED}) and a shuffle per class, "
        f"n_max {counts[0]}, imbalance factor {imbalance_factor:g}; meta = last {meta_per_class} of each shuffled "
        f"class, {tail.num_shared} of {len(tail.meta)} shared with train",
    )


CONVENTIONS = {"paper": paper_convention, "ldam": ldam_convention}


def apply_convention(
    convention: str, labels: np.ndarray, imbalance_factor: float | None, meta_per_class: int, num_classes: int
) -> LongTail:
    """The named convention; an imbalance factor of None is 1, the balanced data set."""
    return pick("convention", convention, CONVENTIONS)(labels, imbalance_factor or 1, meta_per_class, num_classes)
