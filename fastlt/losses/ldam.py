"""Label-distribution-aware margins (Cao et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.losses.base import at_least_float32, check_number
from fastlt.losses.class_balanced import DeferredWeights
from fastlt.state import ClassCounts


def margins(counts: np.ndarray, max_margin: float) -> np.ndarray:
    """m_c proportional to n_c^(-1/4), scaled so that the smallest class has `max_margin`: float64 (C,)."""
    raw = np.asarray(counts, dtype=np.float64) ** -0.25
    return raw * (max_margin / raw.max())


class LDAM(DeferredWeights):
    """Cross-entropy of s * (cos - m_y * 1_y), Eq. 13; with `reweight_from_epoch` it is LDAM-DRW.

    Logits are those of a cosine head of the same scale (`head: cosine`, `head_scale: 30`), which is s * cos already:
    what is subtracted from the label's logit here is s * m_y.

    max_margin: margin of the smallest class, as a cosine.
    scale: s, the same as the head's.
    reweight_from_epoch: first epoch with weights by effective number, 160 of 200 on CIFAR-LT; null is never.
    beta: of the effective number, in [0, 1).
    shifts: s * m, float64 (C,).
    """

    without_imbalance = "every class gets the same margin"
    prior_assumption = (
        "margins are left out: they spread classes apart, and the order of classes that minimises the expected loss is "
        "that of cross-entropy with the same weights"
    )
    shifts: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        max_margin: float = 0.5,
        scale: float = 30.0,
        reweight_from_epoch: int | None = None,
        beta: float = 0.9999,
    ) -> None:
        super().__init__(class_counts, beta, reweight_from_epoch)
        self.scale = check_number("scale", scale, 0)
        shifts = self.scale * margins(class_counts.counts, check_number("max_margin", max_margin, 0))
        self.register_buffer("shifts", torch.from_numpy(shifts), persistent=False)

    @classmethod
    def makes_up_for_frequencies(cls, options: Mapping[str, Any]) -> bool:
        return options.get("reweight_from_epoch") is not None

    def mean_weight(self, labels: Tensor) -> Tensor:
        """LDAM's code averages by the weights' sum over the batch. By its size, the losses of a long-tailed batch, most
        of whose images weigh little, would shrink when the re-weighting begins: to a fifth on CIFAR-100-LT, IF 100.
        """
        return self.class_weights[labels].mean()

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        shift = torch.zeros_like(logits).scatter_(1, labels[:, None], self.shifts[labels].to(logits.dtype)[:, None])
        losses = F.cross_entropy(logits - shift, labels, reduction="none")
        return self.class_weights[labels].to(losses.dtype) * losses
