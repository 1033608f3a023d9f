"""Label-aware smoothing (MiSLAS, Zhong et al. 2021)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastlt.losses.base import PerSampleLoss, at_least_float32, check_number
from fastlt.state import ClassCounts


def smoothing_by_class(counts: np.ndarray, head: float, tail: float) -> np.ndarray:
    """eps_c = tail + (head - tail) * sin(pi (n_c - n_min) / (2 (n_max - n_min))): float64 (C,), in [tail, head].

    The "concave" form, Eq. 8 of MiSLAS: the largest class is smoothed by `head`, the smallest by `tail`.
    """
    low, high = counts.min(), counts.max()
    return tail + (head - tail) * np.sin(np.pi * (counts - low) / (2 * (high - low)))


class LabelAwareSmoothing(PerSampleLoss):
    """(1 - eps_y) * -log p_y + eps_y * mean_k(-log p_k).

    head: eps of the largest class: 0.4 on CIFAR-100-LT with imbalance factor 100 and on Places-LT, 0.3 on ImageNet-LT.
    tail: eps of the smallest class, 0 <= tail <= head < 1: 0.1 on CIFAR-100-LT and Places-LT, 0 on ImageNet-LT.
    smoothing: eps, float64 (C,).
    """

    without_imbalance = "there is no head and no tail to smooth between"
    prior_assumption = "the smoothing is not undone: probabilities are a little flatter than the posterior"
    smoothing: Tensor

    def __init__(self, class_counts: ClassCounts, head: float = 0.3, tail: float = 0.0) -> None:
        super().__init__()
        tail = check_number("tail", tail, 0, 1)
        head = check_number("head", head, tail, 1)
        smoothing = smoothing_by_class(class_counts.counts, head, tail)
        self.register_buffer("smoothing", torch.from_numpy(smoothing), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        log_p = torch.log_softmax(at_least_float32(logits), dim=1)
        smoothing = self.smoothing[labels].to(log_p.dtype)
        own = log_p.gather(1, labels[:, None]).squeeze(1)
        return -(1 - smoothing) * own - smoothing * log_p.mean(1)
