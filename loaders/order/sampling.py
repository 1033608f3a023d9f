"""The images an epoch visits, in order: pure functions of (labels, seed, epoch), the same for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastlt.names import pick

GROUP = 4  # images of one class that class_aware_4 draws in a row, Liu et al. 2019 and Samuel and Chechik 2021
BETA = 0.9999  # of the effective number of samples, Cui et al. 2019
ORDER_STREAM = 0  # keeps these random numbers apart from other uses of (seed, epoch), such as crops


def epoch_order(labels: np.ndarray, *, sampling: str, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The images of one epoch: positions in the split, int64 (N,), always N = len(labels) draws.

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
        return np.arange(len(labels), dtype=np.int64)
    return draw(labels, np.random.default_rng(np.random.SeedSequence([seed, epoch, ORDER_STREAM])))


def shard(order: np.ndarray, rank: int, world_size: int, *, drop_last: bool, batch_size: int) -> np.ndarray:
    """The part of an epoch's order that one process visits, int64 (n,).

    drop_last=True (training): the same number of full batches on every rank; batch k of all ranks together is what one
    process with `world_size` times the batch would see. Empty when there is no full batch for each rank.
    drop_last=False (evaluation): every image on exactly one rank, none repeated; shares differ by one image at most.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    if not drop_last:
        return order[rank::world_size]
    steps = len(order) // (batch_size * world_size)
    batches = order[: steps * batch_size * world_size].reshape(steps, world_size, batch_size)
    return batches[:, rank].reshape(-1)


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
    return rng.permutation(len(labels)).astype(np.int64)


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
    """`count` classes in rounds that visit every class with images once, each round in a new order: int64 (count,)."""
    present = np.unique(labels)
    rounds = -(-count // max(len(present), 1))
    return rng.permuted(np.tile(present, (rounds, 1)), axis=1).reshape(-1)[:count]


def _effective_number(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    probabilities = effective_number_probabilities(np.bincount(labels))
    return _images_of(rng.choice(len(probabilities), size=len(labels), p=probabilities), labels, rng)


def _images_of(classes: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each drawn class, int64 (K,), one of its images: the class's list, reshuffled each time it is used up."""
    by_class = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    drawn = np.bincount(classes, minlength=len(counts))
    # One row of `deck` a card: each class has as many whole shuffled lists as its draws need, one after the other.
    cycles = -(-drawn // np.maximum(counts, 1))
    cards = cycles * counts
    class_of = np.repeat(np.arange(len(counts)), cards)
    place = np.arange(len(class_of)) - np.repeat(np.cumsum(cards) - cards, cards)
    cycle, member = np.divmod(place, counts[class_of])
    deck = np.lexsort((rng.random(len(class_of)), cycle, class_of))
    member = member[deck][place < drawn[class_of]]
    # The cards stand class by class, as the draws do once sorted stably by class.
    order = np.empty(len(classes), dtype=np.int64)
    first = np.cumsum(counts) - counts
    order[np.argsort(classes, kind="stable")] = by_class[np.repeat(first, drawn) + member]
    return order


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
