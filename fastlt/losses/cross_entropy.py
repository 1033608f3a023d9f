"""Cross-entropy, and the two losses that shift its logits or scale its value: balanced softmax and focal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.losses.base import PerSampleLoss, at_least_float32, check_number
from fastlt.state import ClassCounts


class CrossEntropy(PerSampleLoss):
    """-log p_y, p = softmax(z)."""

    def __init__(self, class_counts: ClassCounts) -> None:
        super().__init__()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


class BalancedSoftmax(PerSampleLoss):
    """Cross-entropy of z + log n (Ren et al. 2020, Eq. 4); evaluation takes z as it is.

    log_prior: log(n / sum n), float64 (C,).
    """

    corrects_prior = True
    without_imbalance = "the shift log n is the same for every class and it is plain cross_entropy"
    log_prior: Tensor

    def __init__(self, class_counts: ClassCounts) -> None:
        super().__init__()
        # log(n / sum n): the common shift does not change the loss and keeps the logits near zero.
        counts = torch.from_numpy(class_counts.counts).double()
        self.register_buffer("log_prior", torch.log(counts / counts.sum()), persistent=False)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        return F.cross_entropy(logits + self.log_prior.to(logits.dtype), labels, reduction="none")

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
