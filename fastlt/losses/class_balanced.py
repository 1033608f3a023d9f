"""Weights by the effective number of samples (Cui et al. 2019), at once or deferred."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastlt.losses.base import PerSampleLoss, at_least_float32, check_integer, check_number
from fastlt.losses.cross_entropy import focal
from fastlt.names import pick
from fastlt.state import ClassCounts


def effective_number_weights(counts: np.ndarray, beta: float) -> np.ndarray:
    """w_c = (1 - beta) / (1 - beta^n_c), scaled to sum C: float64 (C,). beta = 0 gives ones, beta -> 1 tends to 1/n.

    counts: int64 (C,), each >= 1. Raises ValueError unless 0 <= beta < 1.
    """
    beta = check_number("beta", beta, 0, 1)
    # 1 - beta^n by expm1: for beta near 1 the difference would cancel.
    effective = -np.expm1(counts * np.log(beta)) if beta > 0 else np.ones(len(counts))
    weights = 1 / effective
    return weights * (len(counts) / weights.sum())


class DeferredWeights(PerSampleLoss):
    """A loss with class weights that are 1 until epoch `from_epoch` and by effective number from then on.

    The deferred re-weighting (DRW) of LDAM.

    from_epoch: counted from 0 in each stage; None for never.
    class_weights: float64 (C,), the weights of the current epoch. balanced_weights: those from `from_epoch` on.
    """

    class_weights: Tensor
    balanced_weights: Tensor

    def __init__(self, class_counts: ClassCounts, beta: float, from_epoch: int | None) -> None:
        super().__init__()
        weights = torch.from_numpy(effective_number_weights(class_counts.counts, beta))
        self.from_epoch = None if from_epoch is None else check_integer("from_epoch", from_epoch, 0)
        self.register_buffer("balanced_weights", weights, persistent=False)
        self.register_buffer("class_weights", torch.ones_like(weights), persistent=False)
        self.on_epoch(0)

    def on_epoch(self, epoch: int) -> None:
        """Switch the weights for `epoch`, in place: a captured graph sees the new ones."""
        if self.from_epoch is not None and epoch >= self.from_epoch:
            self.class_weights.copy_(self.balanced_weights)
        else:
            self.class_weights.fill_(1.0)

    def log_prior_factor(self) -> Tensor:
        return self.class_weights.log()


def softmax_terms(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """Softmax cross-entropy (N,)."""
    return F.cross_entropy(logits, labels, reduction="none")


def sigmoid_terms(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The sum over classes of the binary cross-entropy of class c against the rest (N,)."""
    return binary_cross_entropies(logits, labels).sum(1)


def focal_terms(logits: Tensor, labels: Tensor, gamma: float) -> Tensor:
    """The sum over classes of the binary focal loss (N,)."""
    return focal(binary_cross_entropies(logits, labels), gamma).sum(1)


def binary_cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """-log sigmoid(z_c) for the label's class, -log sigmoid(-z_c) for the others: (N, C)."""
    sign = torch.full_like(logits, -1.0).scatter_(1, labels[:, None], 1.0)
    return -F.logsigmoid(sign * logits)


KINDS = {"softmax": softmax_terms, "sigmoid": sigmoid_terms, "focal": focal_terms}


class ClassBalanced(DeferredWeights):
    """w_y times a softmax, sigmoid or (sigmoid) focal loss: Eqs. 11, 13 and 14 of Cui et al. 2019.

    With the two sigmoid kinds the paper starts the last layer's bias at -log(C - 1): `model.head_init: uniform_prior`.

    kind: softmax, sigmoid or focal.
    beta: of the effective number, in [0, 1).
    gamma: of the focal loss, >= 0; null is 1.
    from_epoch: the first epoch with the weights, counted from 0; 0 is the paper's loss, a later epoch is DRW.
    """

    corrects_prior = True
    without_imbalance = "every weight is 1"
    prior_assumption = "kinds sigmoid and focal are taken for softmax, whose logits carry the prior times the weights"

    def __init__(
        self,
        class_counts: ClassCounts,
        kind: Literal["softmax", "sigmoid", "focal"] = "softmax",
        beta: float = 0.9999,
        gamma: float | None = None,
        from_epoch: int = 0,
    ) -> None:
        super().__init__(class_counts, beta, from_epoch)
        self.terms = pick("kind of loss class_balanced", kind, KINDS)
        if gamma is not None and kind != "focal":
            raise ValueError(f"gamma is {gamma}, which is for kind focal, and kind is {kind!r}: leave it out")
        self.gamma = check_number("gamma", 1.0 if gamma is None else gamma, 0)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = self.terms(at_least_float32(logits), labels, self.gamma)
        return self.class_weights[labels].to(losses.dtype) * losses
