"""Cross-entropy and the two losses that are cross-entropy of shifted or scaled terms: balanced softmax and focal."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlt.state import ClassCounts


def at_least_float32(logits: Tensor) -> Tensor:
    """Logits in the precision a loss is computed in: half types become float32, float64 stays."""
    return logits if logits.dtype == torch.float64 else logits.float()


class CrossEntropy(nn.Module):
    """-log p_y, per sample: logits (N, C) and labels (N,) to (N,) float32, float64 for float64 logits."""

    def __init__(self, class_counts: ClassCounts) -> None:
        super().__init__()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(logits), labels, reduction="none")


class BalancedSoftmax(nn.Module):
    """Cross-entropy of z + log n (Ren et al. 2020, Eq. 4): the softmax of the training set's label distribution.

    Logits (N, C) and labels (N,) to (N,). Evaluation takes the logits as they are.
    """

    def __init__(self, class_counts: ClassCounts) -> None:
        super().__init__()
        # log(n / sum n): the common shift does not change the loss and keeps the logits near zero.
        counts = class_counts.as_tensor().double()
        self.register_buffer("log_prior", torch.log(counts / counts.sum()).float())

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(at_least_float32(logits) + self.log_prior, labels, reduction="none")
