"""Modules that some methods train beside backbone and head, as `Classifier.auxiliary`; evaluation ignores them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlt.losses.base import at_least_float32
from fastlt.models.classifier import Classifier


class Projection(nn.Module):
    """Features (N, D) to points on the unit sphere (N, dim): Linear, BatchNorm, ReLU, Linear, normalised in float32.

    The hidden layer is as wide as the features. Source: MoCo v2's projection with the BatchNorm of PaCo's release.
    """

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_features),
            nn.BatchNorm1d(num_features),
            nn.ReLU(),
            nn.Linear(num_features, dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(at_least_float32(self.layers(features)), dim=1)


class ClassRadii(nn.Module):
    """One learnable radius a class, `radius` (C,), which starts at `initial`: the eps of DRO-LT."""

    def __init__(self, num_classes: int, initial: float) -> None:
        super().__init__()
        self.radius = nn.Parameter(torch.full((num_classes,), float(initial)))


def attach_projection(model: Classifier, dim: int, seed: int) -> None:
    """Give `model` a new `Projection` of its features as `auxiliary`, on its device and in its precision.

    Its weights are drawn from `seed` by a generator of their own: the default one stays where it is, so a resumed run
    can call this too.
    """
    like = next(model.head.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projection = Projection(model.head.in_features, dim)
    model.auxiliary = projection.to(device=like.device, dtype=like.dtype)
