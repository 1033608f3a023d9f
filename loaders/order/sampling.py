"""The images an epoch visits, in order: pure functions of (labels, seed, epoch), the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fastlt.names import pick

GROUP = 4  # images of one class that class_aware_4 draws in a row, Liu et al. 2019 and Samuel and Chechik 2021
BETA = 0.9999  # of the effective number of samples, Cui et al. 2019
PART = 1 << 16  # entries of an order that are worked on at a time, at most; of a short one it is a fiftieth
ORDER_STREAM = 0  # keeps these random numbers apart from other uses of (seed, epoch), such as crops


def epoch_order(labels: np.ndarray, *, sampling: str, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The images of one epoch: positions in the split, int32 (N,), always N = len(labels) draws.

    labels: int64 (N,).
    sampling: "instance", each image once; "class_balanced", each class equally often; "effective_number", each class as
        often as its images' class-balanced loss weights say; "class_aware_4", each class equally often and four of its
        images in a row, so that a batch whose size is a multiple of four is made of whole groups. In the last three,
        every image of a class comes once before any of them comes again.
    shuffle: False keeps split order, and needs "instance".
    Raises ValueError for an unknown sampling, and for another one than "instance" without shuffling.
    """
    draw = pick("sampling", sampling, SAMPLINGS).draw
    if not shuffle:
        if sampling != "instance":
            raise ValueError(f"sampling {sampling!r} draws at random, so it needs shuffle: evaluation uses 'instance'")
        return np.arange(len(labels), dtype=np.int32)
    return draw(labels, np.random.default_rng(np.random.SeedSequence([seed, epoch, ORDER_STREAM])))


def shard(order: np.ndarray, rank: int, world_size: int, *, drop_last: bool, batch_size: int) -> np.ndarray:
    """The part of an epoch's order (N, ...) that one process visits, (n, ...).

    drop_last=True (training): the same number of full batches on every rank; batch k of all ranks together is what one
    process with `world_size` times the batch would see. Empty when there is no full batch for each rank.
    drop_last=False (evaluation): every image on exactly one rank, none repeated; shares differ by one image at most.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    if not drop_last:
        return order[rank::world_size]
    steps = len(order) // (batch_size * world_size)
    batches = order[: steps * batch_size * world_size].reshape(steps, world_size, batch_size, *order.shape[1:])
    return batches[:, rank].reshape(-1, *order.shape[1:])


def share_size(images: int, rank: int, world_size: int, *, drop_last: bool, batch_size: int) -> int:
    """How many of so many images `shard` gives one process."""
    if drop_last:
        return images // (batch_size * world_size) * batch_size
    return len(range(rank, images, world_size))


def share_places(start: int, stop: int, rank: int, world_size: int, *, drop_last: bool, batch_size: int) -> np.ndarray:
    """Where in the epoch's order the images `start` to `stop` of a process's share are, see `shard`: int64 (n,)."""
    own = np.arange(start, stop)
    if drop_last:
        return own + own // batch_size * (batch_size * (world_size - 1)) + rank * batch_size
    return rank + own * world_size


def effective_number_probabilities(class_counts: np.ndarray, beta: float = BETA) -> np.ndarray:
    """How often each class is drawn, float64 (C,), sum 1: `p_c ∝ n_c (1 − β) / (1 − β^{n_c})`.

    The class-balanced weight of an image, one over its class's effective number, becomes its sampling rate, so that a
    class gets n_c times that. β = 0 is instance sampling, β → 1 is class-balanced sampling. A class without images has
    probability 0. Source: Cui et al. 2019, eq. 2, as rates instead of loss weights.
    """
    counts = class_counts.astype(np.float64)
    present = counts > 0
    # −expm1(n log β) is 1 − β^n without cancellation, which matters for n = 1 and β near 1.
    effective = -np.expm1(counts[present] * np.log(beta)) / (1 - beta)
    weights = np.zeros(len(counts))
    weights[present] = counts[present] / effective
    return weights / weights.sum()


def class_shares(class_counts: np.ndarray, sampling: str) -> np.ndarray:
    """The share of each class in the images that `sampling` draws, expected, float64 (C,), sum 1.

    class_counts: int64 (C,), not all 0. ValueError for an unknown sampling.
    """
    return pick("sampling", sampling, SAMPLINGS).shares(class_counts)


def _natural_shares(class_counts: np.ndarray) -> np.ndarray:
    return class_counts / class_counts.sum()


def _equal_shares(class_counts: np.ndarray) -> np.ndarray:
    return _natural_shares(np.minimum(class_counts, 1))


def _instance(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    order = np.arange(len(labels), dtype=np.int32)
    rng.shuffle(order)
    return order


def _class_balanced(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rounds that visit every class once, each in a new order: class counts of an epoch differ by one at most.

    Source: the class-aware sampler of Shen et al. 2016, as cRT uses it.
    """
    return _images_of(_class_rounds(labels, len(labels), rng), labels, rng)


def _class_aware_4(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """As `_class_balanced`, each class drawn for `GROUP` images in a row; the last group may be cut short.

    A group holds an image twice only where its class's list ends and starts anew within it. Source: the class-aware
    sampler of OLTR's release with num_samples_cls = 4, which DRO-LT's has too; there an epoch is C times the largest
    class long.
    """
    groups = -(-len(labels) // GROUP)
    classes = np.repeat(_class_rounds(labels, groups, rng), GROUP)[: len(labels)]
    return _images_of(classes, labels, rng)


def _class_rounds(labels: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` classes in rounds that visit every class with images once, each round in a new order: int32 (count,)."""
    present = np.flatnonzero(np.bincount(labels)).astype(np.int32)
    rounds = np.tile(present, (-(-count // max(len(present), 1)), 1))
    return rng.permuted(rounds, axis=1, out=rounds).reshape(-1)[:count]


def _effective_number(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    probabilities = effective_number_probabilities(np.bincount(labels))
    classes = np.empty(len(labels), dtype=np.int32)
    quarter = max(1, -(-len(classes) // 4))  # each call sums up the probabilities anew
    for start in range(0, len(classes), quarter):
        part = classes[start : start + quarter]
        part[:] = rng.choice(len(probabilities), size=len(part), p=probabilities)
    return _images_of(classes, labels, rng)


def _images_of(classes: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each drawn class, int32 (K,), one of its images: the class's list, reshuffled each time it is used up."""
    counts = np.bincount(labels)
    drawn = np.bincount(classes, minlength=len(counts))
    by_class = np.empty(len(labels), dtype=np.int32)
    first = np.cumsum(counts) - counts
    for part, before in _earlier_ones(labels, len(counts)):
        by_class[first[labels[part]] + before] = np.arange(part.start, part.stop)
    # The images of the draws of each class, in turn: as many shuffled lists as they need, one after the other.
    images = np.empty(len(classes), dtype=np.int32)
    of_draws = np.cumsum(drawn) - drawn
    for c in np.flatnonzero(drawn):
        list_of_class = by_class[first[c] : first[c] + counts[c]]
        shuffled = np.argsort(rng.random((-(-drawn[c] // counts[c]), counts[c])), axis=1, kind="stable")
        images[of_draws[c] : of_draws[c] + drawn[c]] = list_of_class[shuffled.reshape(-1)[: drawn[c]]]
        del list_of_class, shuffled  # a view, by which `by_class` would stay
    del by_class
    order = np.empty(len(classes), dtype=np.int32)
    for part, before in _earlier_ones(classes, len(counts)):
        order[part] = images[of_draws[classes[part]] + before]
    return order


def _earlier_ones(classes: np.ndarray, num_classes: int) -> Iterator[tuple[slice, np.ndarray]]:
    """How many entries of the same class come before each entry, part by part: its place and int64 (n,)."""
    seen = np.zeros(num_classes, dtype=np.int64)
    small = np.min_scalar_type(num_classes)  # two bytes are sorted in linear time
    for part in _parts(len(classes)):
        of_part = classes[part].astype(small)
        order = np.argsort(of_part, kind="stable")
        in_order = of_part[order]
        begins = np.flatnonzero(in_order[1:] != in_order[:-1]) + 1  # of the runs of a class, but the first
        begins = np.concatenate([[0], begins])
        lengths = np.diff(begins, append=len(order))
        before = np.empty(len(order), dtype=np.int64)
        before[order] = np.arange(len(order)) - np.repeat(begins, lengths)
        before += seen[of_part]
        seen[in_order[begins]] += lengths
        yield part, before


def _parts(length: int) -> Iterator[slice]:
    """Slices of up to `PART` entries; arrays as long as the split are made only where they must be."""
    part = min(PART, max(1, PART >> 4, length // 50))
    for start in range(0, length, part):
        yield slice(start, min(start + part, length))


@dataclass(frozen=True)
class Sampling:
    """How the images of an epoch are drawn: `draw(labels, rng)` gives their order, `shares` is as `class_shares`."""

    draw: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    shares: Callable[[np.ndarray], np.ndarray]


SAMPLINGS = {
    "instance": Sampling(_instance, _natural_shares),
    "class_balanced": Sampling(_class_balanced, _equal_shares),
    "effective_number": Sampling(_effective_number, effective_number_probabilities),
    "class_aware_4": Sampling(_class_aware_4, _equal_shares),
}
