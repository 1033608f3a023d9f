"""How well a network does on images whose classes are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastlt.inference.predictions import Predictions
from fastlt.run.metrics import Metrics
from fastlt.state import ClassCounts


@dataclass(frozen=True)
class Evaluation:
    """metrics: as `fastlt.run.metrics.Metrics.summary` has them, the groups by the training images of the classes.

    predictions: of the images that could be read. labels: of these, int64 (N,). split: which one of a data set they
        are; None where it has no splits, or labels were given.
    """

    metrics: dict[str, Any]
    predictions: Predictions
    labels: np.ndarray
    split: str | None = None

    def __getitem__(self, metric: str) -> Any:
        """A metric by its name, such as "top1"."""
        return self.metrics[metric]


def evaluation(
    predictions: Predictions, labels: np.ndarray, counts: ClassCounts, split: str | None = None
) -> Evaluation:
    """The metrics of predictions of at least min(5, C) classes. labels: int64 (N,). split: as of `Evaluation`."""
    metrics, hits = Metrics(counts.num_classes), predictions.indices[:, :5] == labels[:, None]
    metrics.add(
        torch.from_numpy(predictions.indices[:, 0].copy()),
        torch.from_numpy(predictions.probabilities[:, 0].copy()),
        torch.from_numpy(hits.any(axis=1)),
        torch.from_numpy(labels),
    )
    return Evaluation(metrics.summary(counts), predictions, labels, split)
