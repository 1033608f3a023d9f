"""The parts of RIDE's network (Wang et al. 2021): a shared stem, narrower branches, a head for each, and a router.

`fastlt.models.classifier.ExpertClassifier` puts them together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlt.models.heads import Head

# What can be split: the module that defines the network, the channels of its stages, and the layers that are shared.
# The last two stages are the experts', as in the authors' code.
Family = tuple[tuple[int, ...], tuple[str, ...]]
CIFAR: Family = ((16, 32, 64), ("conv1", "bn1", "act1", "layer1"))
IMAGENET: Family = ((64, 128, 256, 512), ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2"))
FAMILIES: dict[str, Family] = {
    "fastlt.models.cifar_resnet": CIFAR,
    "fastlt.models.resnet10": IMAGENET,
    "timm.models.resnet": IMAGENET,
}
ROUTER_WIDTH = 16


def expert_family(name: str) -> Family:
    """How the backbone `name` is split; ValueError for one that is no ResNet of four (CIFAR: three) plain stages."""
    module = timm.model_entrypoint(name).__module__
    own_widths = name.split(".")[0].endswith("_pruned") or name.startswith("test_")
    if module not in FAMILIES or own_widths:
        raise ValueError(
            f"{name} cannot be split into experts: they take over the last two stages of a ResNet at a reduced width. "
            "Take cifar_resnet32 (or another depth), resnet10, or a ResNet of timm (resnet18, resnet50, "
            "resnext50_32x4d, seresnet50, ...), or leave model.experts out"
        )
    return FAMILIES[module]


def narrowed(channels: Sequence[int], width: float) -> tuple[int, ...]:
    """The channels with those of the last two stages multiplied by `width`, rounded, at least 1."""
    return (*channels[:-2], *(max(1, round(c * width)) for c in channels[-2:]))


def width_of(network: nn.Module) -> int:
    """D of a timm network without a classifier: the width of its pooled features."""
    width = getattr(network, "head_hidden_size", None) or getattr(network, "num_features", None)
    assert isinstance(width, int), type(network)
    return width


class ExpertBackbone(nn.Module):
    """The early layers of a ResNet once, its last two stages `experts` times.

    create: makes the network with the channels it is given, without a classifier; called once for each expert, so that
        each starts from weights of its own. family: of `expert_family`. width: of an expert, over the network's.
    Images (N, 3, H, W) to pooled features (E, N, D).
    """

    def __init__(self, create: Callable[..., nn.Module], family: Family, experts: int, width: float) -> None:
        super().__init__()
        channels, shared = family
        networks = [create(channels=narrowed(channels, width)) for _ in range(experts)]
        own = (*(f"layer{stage}" for stage in range(len(channels) - 1, len(channels) + 1)), "global_pool")
        self.shared = _chain(networks[0], shared)
        self.experts = nn.ModuleList(_chain(network, own) for network in networks)
        self.num_features = width_of(networks[0])

    def forward(self, images: Tensor) -> Tensor:
        maps = self.shared(images)
        return torch.stack([expert(maps) for expert in self.experts])


def _chain(network: nn.Module, names: Sequence[str]) -> nn.Sequential:
    return nn.Sequential(OrderedDict((name, getattr(network, name)) for name in names))


class ExpertHead(Head):
    """One head for each expert: features (E, N, D) to logits (E, N, C)."""

    def __init__(self, create: Callable[[], Head], experts: int) -> None:
        super().__init__()
        heads = [create() for _ in range(experts)]
        self.in_features, self.out_features = heads[0].in_features, heads[0].out_features
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([head(own) for head, own in zip(self.heads, features, strict=True)])


class ExpertRouter(nn.Module):
    """RIDE's expert assignment: a score after each expert but the last, a further one is asked where it is positive.

    score_i = v . [the `top` largest mean logits of experts 0..i, relu(U_i f_i / ||f_i||)] + b, with one v and b for all
    i and one U_i of 16 rows an expert. With fewer classes than `top` all logits are taken.

    asked: int64 (2,), the experts asked and the images seen since it was last set to zero; not saved with the model.
    """

    asked: Tensor

    def __init__(self, experts: int, num_features: int, num_classes: int, top: int) -> None:
        super().__init__()
        self.top = min(top, num_classes)
        hidden = [nn.Linear(num_features, ROUTER_WIDTH) for _ in range(experts - 1)]
        self.hidden = nn.ModuleList(hidden)
        self.score = nn.Linear(self.top + ROUTER_WIDTH, 1)
        for layer in (*hidden, self.score):
            nn.init.kaiming_normal_(layer.weight)
        self.register_buffer("asked", torch.zeros(2, dtype=torch.int64), persistent=False)

    def forward(self, expert: int, features: Tensor, mean_logits: Tensor) -> Tensor:
        """Scores (N,) after `expert`: its features (N, D), and the mean logits (N, C) of all experts up to it."""
        hidden = F.relu(self.hidden[expert](F.normalize(features, dim=1)))
        top = mean_logits.topk(self.top, dim=1).values
        return self.score(torch.cat([top.to(hidden.dtype), hidden], dim=1)).squeeze(1)
