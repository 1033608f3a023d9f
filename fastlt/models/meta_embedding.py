"""OLTR's model parts (Liu et al. 2019): the dynamic meta-embedding head, and modulated attention before the pooling."""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlt.losses.base import at_least_float32
from fastlt.models.heads import Head

REACH = 10.0  # over the distance to the nearest centroid: how far a feature counts as known
SCALE = 16.0  # of the cosine classifier, as in the authors' code


class MetaEmbeddingHead(Head):
    """Logits of a feature that a memory of class centroids has enriched (Sec. 3.2 of the paper).

    With the centroids M (C, D), which stay constant in `forward`:

        memory       m = softmax(hallucinator(x)) M
        selector     e = tanh(selector(x))
        reachability r = 10 / min_c ||x - M_c||
        embedding    v = r (x + e * m)
        logits       z_c = 16 * cos(w_c, v) * ||v|| / (1 + ||v||)

    centroids: (C, D), zero until they are set. Only a loss on centroids, OLTR's, gives them a gradient.
    trained: the head of the stage before, a linear one; the hallucinator starts as a copy of it.
    """

    def __init__(self, trained: Head, seed: int) -> None:
        super().__init__()
        num_classes, width = trained.out_features, trained.in_features
        self.in_features, self.out_features = width, num_classes
        # From a generator of its own: the default one stays where it is, so that a resumed run can build this too.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hallucinator = nn.Linear(width, num_classes)
            self.selector = nn.Linear(width, width)
            self.weight = nn.Parameter(torch.empty(num_classes, width).uniform_(-1, 1) * width**-0.5)
        self.centroids = nn.Parameter(torch.zeros(num_classes, width))
        like = next(trained.parameters())
        self.to(device=like.device, dtype=like.dtype)
        self.hallucinator.load_state_dict(trained.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        """x: features (N, D). Returns (N, C)."""
        # Distances lose what half precision cannot hold of two long vectors that lie close to each other.
        x = at_least_float32(x)
        centroids = self.centroids.detach()
        memory = torch.softmax(self.hallucinator(x), dim=1) @ centroids
        infused = torch.tanh(self.selector(x)) * memory
        return self.classify((REACH / self.distance(x, centroids)) * (x + infused))

    @staticmethod
    def distance(x: Tensor, centroids: Tensor) -> Tensor:
        """min_c ||x - M_c|| as (N, 1), above 0; its gradient is the one through the nearest centroid."""
        with torch.no_grad():
            # The matrix product's shortcut rounds the small distances away, and the smallest is what is asked for.
            nearest = torch.cdist(x, centroids, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        squared = (x - centroids[nearest]).square().sum(1, keepdim=True)
        # A feature that is its centroid would divide by zero; its embedding is as good as infinitely long.
        return squared.clamp_min(torch.finfo(squared.dtype).eps ** 2).sqrt()

    def classify(self, embedding: Tensor) -> Tensor:
        """The cosine classifier with OLTR's squashed length of the embedding (N, D): (N, C), between -16 and 16."""
        squashed = embedding / (1 + torch.linalg.vector_norm(embedding, dim=1, keepdim=True))
        return F.linear(SCALE * squashed, F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class ModulatedAttention(nn.Module):
    """y = x + s * W self_attention(x) on feature maps x (N, D, side, side), s a softmax over their positions.

    Self-attention is the embedded-Gaussian non-local block with half the channels; s is a linear function of the whole
    map. W starts at 0, so that putting the layer in changes no feature. The authors' layer asks for that too, but their
    network draws every convolution anew afterwards, W included, and so leaves the features of stage 1.

    Raises ValueError in `forward` for maps of another size.
    """

    def __init__(self, channels: int, side: int, seed: int) -> None:
        super().__init__()
        self.side, inner = side, channels // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query, self.key, self.value = (nn.Conv2d(channels, inner, 1) for _ in range(3))
            self.spatial = nn.Linear(side * side * channels, side * side)
            for layer in (self.query, self.key, self.value):
                nn.init.kaiming_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            self.mask = nn.Conv2d(inner, channels, 1, bias=False)
        nn.init.zeros_(self.mask.weight)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.side, self.side):
            raise ValueError(
                f"the feature maps are {x.shape[2]} x {x.shape[3]}, the attention is for {self.side} x {self.side}: "
                f"set options.attention_side to the side of the maps"
            )
        query, key, value = (layer(x).flatten(2).mT for layer in (self.query, self.key, self.value))
        attended = self.attend(query, key, value)
        mask = self.mask(attended.mT.unflatten(2, x.shape[2:]))
        spatial = torch.softmax(self.spatial(x.flatten(1)), dim=1)
        return x + spatial.view(-1, 1, self.side, self.side) * mask

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """softmax(query key^T) value: (N, positions, inner) each."""
        return F.scaled_dot_product_attention(query, key, value, scale=1.0)


def pooling_of(backbone: nn.Module) -> nn.Module:
    """The module that pools the last feature maps of a ResNet, timm's or ours; ValueError for a network without one."""
    pool = getattr(backbone, "global_pool", None)
    if not isinstance(pool, nn.Module):
        raise ValueError(
            f"attention_side is set, but {type(backbone).__name__} has no pooling module to put attention before: take "
            "a ResNet, or leave the option out"
        )
    return pool


def insert_attention(backbone: nn.Module, side: int, seed: int) -> ModulatedAttention:
    """Put a `ModulatedAttention` between the last feature maps of `backbone` and its pooling; changes it in place."""
    like, channels = next(backbone.parameters()), getattr(backbone, "num_features", None)
    assert isinstance(channels, int), type(backbone)
    attention = ModulatedAttention(channels, side, seed).to(device=like.device, dtype=like.dtype)
    backbone.global_pool = nn.Sequential(attention, pooling_of(backbone))
    return attention


def side_of_maps(name: str, image_size: int) -> int | None:
    """Side of the last feature maps of the timm network `name`; None where timm says nothing of it."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None or not cfg.pool_size or cfg.pool_size[-1] <= 1:
        return None
    reduction = cfg.input_size[-1] // cfg.pool_size[-1]
    return -(-image_size // reduction)
