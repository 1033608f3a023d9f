"""A head that knows some of the classes: that of an expert for a part of them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlt.models.heads import Head


class RestrictedHead(Head):
    """The wrapped head's logits for the classes it knows, minus infinity for the others.

    Softmax, loss and gradients are those of a head of the known classes alone, and `forward` still gives (N, C).

    known: bool (C,), a buffer; every class until it is set.
    """

    known: Tensor

    def __init__(self, inner: Head) -> None:
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features
        known = torch.ones(inner.out_features, dtype=torch.bool, device=next(inner.parameters()).device)
        self.register_buffer("known", known)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).masked_fill(~self.known, float("-inf"))
