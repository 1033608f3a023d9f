"""Decoupled training on a trained head: start the head anew, scale its logits, shorten its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastlt.models.heads import CosineHead, Head, LinearHead
from fastlt.models.restricted_head import RestrictedHead


class ScaledHead(Head):
    """z = head(x) * s, with one learnable scale a class that starts at 1: (W x + b) ⊙ s of LWS (Kang et al. 2020).

    scale: (C,). Wrapping changes no logit; the wrapped head keeps its weights as `inner`.
    """

    def __init__(self, inner: Head) -> None:
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features
        like = next(inner.parameters())
        self.scale = nn.Parameter(torch.ones(inner.out_features, dtype=like.dtype, device=like.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


def fresh_head(head: Head, seed: int) -> Head:
    """A head of the same kind, size, device and precision with random weights drawn from `seed`; without scales,
    and for all classes.

    Draws from a generator of its own: the default one stays where it is, so a resumed run can call this too.
    """
    if isinstance(head, ScaledHead | RestrictedHead):
        return fresh_head(head.inner, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(head, CosineHead):
            new = CosineHead(head.in_features, head.out_features, head.scale)
        else:
            new = LinearHead(head.in_features, head.out_features)
    like = next(head.parameters())
    return new.to(device=like.device, dtype=like.dtype)


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """w_c / ||w_c||^tau for each row of `weight` (C, D); tau = 0 returns them as they are, tau = 1 gives unit rows.

    A row of zeros stays zero. Source: Kang et al. 2020, Sec. 4.2.
    """
    norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return weight / torch.where(norm > 0, norm, torch.ones_like(norm)) ** tau
