"""Whether probabilities mean what they say: accuracy in bins of confidence, and the expected calibration error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastlt.run.metrics import ECE_BINS, confidence_bin
from fastlt.run.predictions import Predictions


@dataclass(frozen=True)
class Calibration:
    """Over the images of all seeds; NaN in a bin without one.

    confidence, accuracy: float64 (15,), means over the images of each bin. images: int64 (15,).
    errors: the expected calibration error of each seed, as in `fastlt.run.metrics`.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray
    errors: list[float]


def calibration(predictions: Sequence[Predictions]) -> Calibration:
    """The reliability of the likeliest class; 15 bins of equal width (Guo et al. 2017)."""
    sums = np.array([bin_sums(of_seed) for of_seed in predictions])
    confidence, right, images = sums.sum(axis=0)
    some = np.where(images > 0, images, np.nan)
    errors = [float(np.abs(c - r).sum() / n.sum()) for c, r, n in sums]
    return Calibration(confidence / some, right / some, images.astype(np.int64), errors)


def bin_sums(predictions: Predictions) -> np.ndarray:
    """The sum of confidences, the right answers and the images of each bin: float64 (3, 15)."""
    confidence = predictions.confidence.astype(np.float64)
    bins = confidence_bin(torch.from_numpy(confidence)).numpy()
    weights = (confidence, predictions.right.astype(np.float64), np.ones(len(predictions)))
    return np.stack([np.bincount(bins, weights=w, minlength=ECE_BINS) for w in weights])
