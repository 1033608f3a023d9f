"""A head that knows some of the classes: what an expert for a part of them predicts with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RestrictedHead(nn.Module):
    """The wrapped head's logits for the classes it knows, minus infinity for the others.

    Softmax, loss and gradients are those of a head of the known classes alone, and `forward` still gives (N, C).

    known: bool (C,), a buffer; every class until it is set.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        like = inner.weight
        self.register_buffer("known", torch.ones(like.shape[0], dtype=torch.bool, device=like.device))

    @property
    def weight(self) -> Tensor:
        """The wrapped head's W (C, D)."""
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).masked_fill(~self.known, float("-inf"))
