"""The table of losses and `build_loss`."""

from __future__ import annotations

import inspect

from torch import nn

from fastlt.losses.cross_entropy import BalancedSoftmax, CrossEntropy
from fastlt.names import pick, unknown
from fastlt.state import ClassCounts

LOSSES: dict[str, type[nn.Module]] = {"cross_entropy": CrossEntropy, "balanced_softmax": BalancedSoftmax}

# Losses that differ from a simpler one only through the class counts, and that simpler one.
COUNT_BASED = {"balanced_softmax": "cross_entropy"}


def build_loss(name: str, class_counts: ClassCounts, **options) -> nn.Module:
    """The loss `name` for a training set of these class counts; `forward(logits (N, C), labels (N,))` -> (N,).

    Raises ValueError for an unknown name or option, for an option's bad value, and for a loss that needs an imbalance
    on a perfectly balanced training set.
    """
    loss = pick("loss", name, LOSSES)
    allowed = [p for p in inspect.signature(loss).parameters if p != "class_counts"]
    for option in options:
        if option not in allowed:
            if not allowed:
                raise ValueError(f"loss {name} takes no options, but was given {option!r}")
            raise ValueError(unknown(f"option of loss {name}", option, allowed))
    if name in COUNT_BASED and class_counts.counts.min() == class_counts.counts.max():
        raise ValueError(
            f"loss {name} works by the differences between class sizes, but every class has {class_counts.counts[0]} "
            f"training images; use {COUNT_BASED[name]}, or a data set with an imbalance"
        )
    return loss(class_counts, **options)
