"""The table of losses, `build_loss`, and `check_loss` for recipes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import numpy as np

from fastlt.losses.base import PerSampleLoss
from fastlt.losses.class_balanced import ClassBalanced
from fastlt.losses.cross_entropy import BalancedSoftmax, CrossEntropy, Focal
from fastlt.losses.equalization import Equalization
from fastlt.losses.ldam import LDAM
from fastlt.losses.smoothing import LabelAwareSmoothing
from fastlt.names import pick, unknown
from fastlt.state import ClassCounts

LOSSES: dict[str, type[PerSampleLoss]] = {
    "cross_entropy": CrossEntropy,
    "balanced_softmax": BalancedSoftmax,
    "focal": Focal,
    "class_balanced": ClassBalanced,
    "ldam": LDAM,
    "equalization": Equalization,
    "label_aware_smoothing": LabelAwareSmoothing,
}

SOME_COUNTS = ClassCounts(np.array([100, 10, 1], dtype=np.int64), ("many", "medium", "few"))


def check_loss(name: str, options: Mapping[str, object]) -> None:
    """ValueError when `name` is no loss, or for options that it does not take or whose values it does not allow.

    Needs no class counts: the loss is made for a small long tail, and let go.
    """
    allowed = [p for p in inspect.signature(pick("loss", name, LOSSES)).parameters if p != "class_counts"]
    for option in options:
        if not allowed:
            raise ValueError(f"loss {name} takes no options, but {option!r} is given")
        if option not in allowed:
            raise ValueError(unknown(f"option of loss {name}", option, allowed))
    LOSSES[name](SOME_COUNTS, **options)


def build_loss(name: str, class_counts: ClassCounts, **options: object) -> PerSampleLoss:
    """The loss `name` for a training set of these class counts.

    It takes logits, float (N, C), and labels, int64 (N,) in [0, C), to one loss a sample, (N,): float32, or float64 for
    float64 logits.
    Raises ValueError for an unknown name or option, for an option's bad value, and for a class-count-based loss on a
    training set that is perfectly balanced.
    """
    check_loss(name, options)
    loss, counts = LOSSES[name], class_counts.counts
    if loss.without_imbalance is not None and counts.min() == counts.max():
        raise ValueError(
            f"loss {name} needs classes of different size, but each has {counts[0]} training images: "
            f"{loss.without_imbalance}. Use another loss or a long-tailed training set"
        )
    return loss(class_counts, **options)
