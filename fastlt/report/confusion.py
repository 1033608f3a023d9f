"""Which classes are taken for which: the matrix of all classes, of groups of classes, and the most frequent pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastlt.run.predictions import Predictions
from fastlt.state import ClassCounts

MOST_CLASSES = 60  # whose matrix is shown class by class
GROUPS = 20  # of classes, in the matrix of more
MOST_PAIRS = 500  # that are listed


@dataclass(frozen=True)
class Confusion:
    """Test images by what they are and what they were taken for, as the mean over seeds.

    names: of the rows and columns, the classes with the most training images first.
    share: float64 (R, R), the part of a row's images that were taken for a column; NaN in a row without images.
    edges: rows before which another of many-, medium- and few-shot begins, by its name.
    """

    names: list[str]
    share: np.ndarray
    edges: dict[str, int]


@dataclass(frozen=True)
class Pair:
    """Images of one class that were taken for another: how many, as a mean over seeds, and which part of the class."""

    true: int
    taken_for: int
    images: float
    share: float


def by_count(counts: ClassCounts) -> np.ndarray:
    """The classes with the most training images first, of equal ones the lower label: int64 (C,)."""
    return np.argsort(-counts.counts, kind="stable")


def confusion(predictions: Sequence[Predictions], counts: ClassCounts) -> Confusion:
    """The matrix over all classes, or over at most 20 groups of classes of like size where there are more than 60.

    Groups are cut inside many-, medium- and few-shot, never across.
    """
    order = by_count(counts)
    if counts.num_classes <= MOST_CLASSES:
        parts, names = [order[i : i + 1] for i in range(len(order))], [counts.names[c] for c in order]
    else:
        parts = class_groups(counts)
        names = [group_name(counts.counts[part]) for part in parts]
    row_of = np.empty(counts.num_classes, dtype=np.int64)
    for row, part in enumerate(parts):
        row_of[part] = row
    cells = np.zeros((len(parts), len(parts)))
    for of_seed in predictions:
        np.add.at(cells, (row_of[of_seed.labels], row_of[of_seed.predicted]), 1)
    total = cells.sum(axis=1, keepdims=True)
    share = np.divide(cells, total, out=np.full_like(cells, np.nan), where=total > 0)
    masks = counts.shot_masks()
    edges = {}
    for row, part in enumerate(parts):
        shots = next(name for name, mask in masks.items() if mask[part[0]])
        edges.setdefault(shots, row)
    return Confusion(names, share, edges)


def class_groups(counts: ClassCounts) -> list[np.ndarray]:
    """The classes in at most GROUPS groups by training images, the largest first, none across two kinds of shots."""
    order, groups = by_count(counts), []
    for mask in counts.shot_masks().values():
        inside = order[mask[order]]
        if len(inside):
            pieces = max(1, round(GROUPS * len(inside) / len(order)) if len(inside) >= GROUPS else 1)
            groups += np.array_split(inside, min(pieces, len(inside)))
    return groups


def group_name(sizes: np.ndarray) -> str:
    """A group of classes by the training images of its largest and its smallest: `120-98 images`."""
    largest, smallest = int(sizes.max()), int(sizes.min())
    span = f"{largest:,}" if largest == smallest else f"{largest:,} – {smallest:,}"
    return f"{span} images"


def confused_pairs(predictions: Sequence[Predictions], num_classes: int) -> list[Pair]:
    """The pairs of classes that are most often confused, the most frequent first."""
    total = np.zeros(num_classes)
    codes = []
    for of_seed in predictions:
        total += np.bincount(of_seed.labels, minlength=num_classes)
        wrong = ~of_seed.right
        codes.append(of_seed.labels[wrong] * num_classes + of_seed.predicted[wrong])
    pairs, images = np.unique(np.concatenate(codes), return_counts=True)
    first = np.argsort(-images, kind="stable")[:MOST_PAIRS]
    return [
        Pair(int(code // num_classes), int(code % num_classes), n / len(predictions), n / total[code // num_classes])
        for code, n in zip(pairs[first], images[first], strict=True)
    ]


def where_errors_go(predictions: Sequence[Predictions], counts: ClassCounts) -> list[tuple[str, dict[str, float]]]:
    """Of the images of many-, medium- and few-shot classes, the parts that are right and that were taken for others.

    Each kind of class has its part, as the mean over seeds. Kinds without test images are left out.
    """
    masks = counts.shot_masks()
    labels = np.concatenate([of_seed.labels for of_seed in predictions])
    predicted = np.concatenate([of_seed.predicted for of_seed in predictions])
    rows = []
    for name, mask in masks.items():
        inside = mask[labels]
        if inside.any():
            wrong = predicted[inside] != labels[inside]
            shares = {"right": float(1 - wrong.mean())}
            shares |= {other: float((wrong & of[predicted[inside]]).mean()) for other, of in masks.items()}
            rows.append((name, shares))
    return rows
