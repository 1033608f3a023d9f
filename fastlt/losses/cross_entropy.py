"""Cross-entropy, and the two losses that shift its logits or scale its value: balanced softmax and focal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.losses.base import PerSampleLoss, at_least_float32, check_number, log_prior
from fastlt.state import ClassCounts


class CrossEntropy(PerSampleLoss):
    """-log p_y, p = softmax(z).

    label_smoothing: eps of (1 - eps) * -log p_y + eps * mean_k(-log p_k), in [0, 1).
    """

    def __init__(self, class_counts: ClassCounts, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(logits), labels, reduction="none", label_smoothing=self.label_smoothing)


class BalancedSoftmax(PerSampleLoss):
    """Cross-entropy of z + tau log n (Ren et al. 2020, Eq. 4; tau: Menon et al. 2021); evaluation takes z as it is.

    tau: strength of the adjustment, >= 0; 1 is balanced softmax.
    label_smoothing: eps as in cross_entropy, of the softmax of the shifted logits; in [0, 1).
    log_prior: tau log(n / sum n), float64 (C,).
    """

    corrects_prior = True
    without_imbalance = "the shift log n is the same for every class and it is plain cross_entropy"
    log_prior: Tensor

    def __init__(self, class_counts: ClassCounts, tau: float = 1.0, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
        # log(n / sum n): the common shift does not change the loss and keeps the logits near zero.
        self.register_buffer("log_prior", check_number("tau", tau, 0) * log_prior(class_counts), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        shifted = logits + self.log_prior.to(logits.dtype)
        return F.cross_entropy(shifted, labels, reduction="none", label_smoothing=self.label_smoothing)

    def log_prior_factor(self) -> Tensor:
        return -self.log_prior


class Focal(PerSampleLoss):
    """(1 - p_y)^gamma * -log p_y with a softmax p, as in LDAM's code and the tables that follow it.

    gamma: >= 0; 0 is cross-entropy.
    """

    prior_assumption = "the focal loss is taken for cross-entropy: it has the same order of classes, and flatter logits"

    def __init__(self, class_counts: ClassCounts, gamma: float = 1.0) -> None:
        super().__init__()
        self.gamma = check_number("gamma", gamma, 0)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return focal(F.cross_entropy(at_least_float32(logits), labels, reduction="none"), self.gamma)


def focal(cross_entropy: Tensor, gamma: float) -> Tensor:
    """(1 - p)^gamma * cross_entropy for cross_entropy = -log p, elementwise."""
    # expm1 keeps 1 - p exact for p near 1; the floor keeps the slope of a fractional power finite at p = 1.
    miss = -torch.expm1(-cross_entropy)
    return miss.clamp_min(torch.finfo(miss.dtype).tiny).pow(gamma) * cross_entropy
