"""Heads: from pooled features (N, D) to logits (N, C)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """The base of every head: `forward` takes features (N, D) to logits (N, C).

    in_features: D. out_features: C.
    """

    in_features: int
    out_features: int


class LinearHead(nn.Linear, Head):
    """z = W x + b, with torch's default initialisation."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__(num_features, num_classes)


class CosineHead(Head):
    """z_c = s * cos(w_c, x): both normalised to unit length, no bias (LDAM's and RIDE's normalised linear layer).

    scale: the s of LDAM and RIDE (30). It is applied here, so that logits are what the softmax is taken of, in training
        and in evaluation; a loss that speaks of s (LDAM) takes logits that already contain it. It is fixed: the
        long-tail literature does not learn it.
    """

    def __init__(self, num_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        if scale <= 0:
            raise ValueError(f"head_scale must be positive, not {scale}: cosines are multiplied by it (30 is usual)")
        self.in_features, self.out_features, self.scale = num_features, num_classes, float(scale)
        self.weight = nn.Parameter(F.normalize(torch.randn(num_classes, num_features), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.scale * F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"


HEADS: dict[str, Callable[..., Head]] = {"linear": LinearHead, "cosine": CosineHead}
