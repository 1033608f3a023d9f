"""The network that is exported: of one run, or the mean of several, with what programs cannot hold put otherwise."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastlt.models import Classifier, ExpertClassifier
from fastlt.models.meta_embedding import MetaEmbeddingHead, ModulatedAttention
from fastlt.models.timm_network import merged
from fastlt.run.trained import TrainedRun


class Exported(nn.Module):
    """A copy of a trained network on the CPU, in contiguous memory, that takes images to float32 logits.

    preprocess: it takes uint8 (N, 3, S, S) and normalises; otherwise float32 that is normalised already.
    dtype: of the weights, and of what the network computes between images and logits.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, trained: TrainedRun, *, preprocess: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.preprocess, self.dtype = preprocess, dtype
        self.network = copy.deepcopy(exportable(trained.model)).to(dtype).to(memory_format=torch.contiguous_format)
        mean, std = (torch.tensor(of, dtype=torch.float64).view(1, 3, 1, 1) for of in (trained.mean, trained.std))
        self.register_buffer("scale", (1 / (255 * std)).float())
        self.register_buffer("shift", (-mean / std).float())
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> Tensor:
        if self.preprocess:
            images = images.float() * self.scale + self.shift
        return self.network(images.to(self.dtype)).float()


class ExportedMean(nn.Module):
    """The log of the mean probability of several networks: (N, C), as `fastlt ensemble` puts runs together.

    It takes uint8 (N, 3, S, S), and each network normalises for itself. dtype: as of `Exported`.
    """

    def __init__(self, runs: Sequence[TrainedRun], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.networks = nn.ModuleList(Exported(run, preprocess=True, dtype=dtype) for run in runs)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        log_p = torch.stack([torch.log_softmax(network(images), dim=1) for network in self.networks])
        return torch.logsumexp(log_p, dim=0) - math.log(len(log_p))


class RoutedExperts(nn.Module):
    """RIDE's routed experts without a branch: every expert sees every image, and those that were not asked count not.

    Logits are those of `ExpertClassifier`, up to rounding; the saving of the router is gone.
    """

    def __init__(self, model: ExpertClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        model, router = self.model, self.model.router
        assert router is not None
        features = model.features(images)
        logits = model.head(features)
        total, active = logits[0], torch.ones_like(logits[0, :, :1])
        asked = active
        for i in range(len(model.head.heads) - 1):
            further = router(i, features[i], total / (i + 1)) > 0
            active = active * further[:, None].to(active.dtype)
            total, asked = total + active * logits[i + 1], asked + active
        return total / asked


def nearest_distance(x: Tensor, centroids: Tensor) -> Tensor:
    """`MetaEmbeddingHead.distance` by operations that every program has: (N, 1), for x (N, D) and centroids (C, D)."""
    squared = (x[:, None] - centroids[None]).square().sum(2).amin(1, keepdim=True)
    return squared.clamp_min(torch.finfo(squared.dtype).eps ** 2).sqrt()


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`ModulatedAttention.attend` likewise."""
    return torch.softmax(query @ key.mT, dim=2) @ value


def exportable(model: Classifier) -> nn.Module:
    """The network, or one that computes the same by operations that programs have; `model` stays as it is."""
    model = merged(model)
    if isinstance(model.head, MetaEmbeddingHead):
        model = copy.deepcopy(model)
        for module in model.modules():
            if isinstance(module, MetaEmbeddingHead):
                module.distance = nearest_distance
            elif isinstance(module, ModulatedAttention):
                module.attend = attention
    if isinstance(model, ExpertClassifier) and model.router is not None:
        return RoutedExperts(model)
    return model
