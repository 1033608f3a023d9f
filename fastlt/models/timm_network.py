"""A trained `Classifier` as the network that timm makes by the same name, where the two compute the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from fastlt.models.adapters import adapted_layers, has_adapters, merge_adapters
from fastlt.models.classifier import OURS, Classifier, ExpertClassifier, build_model, fixed_input_size
from fastlt.models.heads import CosineHead, Head, LinearHead
from fastlt.models.restricted_head import RestrictedHead
from fastlt.models.retrained_heads import ScaledHead
from fastlt.models.weight_files import Tensors


def timm_network(model: Classifier, name: str, image_size: int) -> nn.Module:
    """The timm network `name` in eval mode on the CPU, with the weights of `model` and its head folded into one layer.

    Logits are equal up to rounding. ValueError, which says why, where timm's network cannot compute them.
    """
    if isinstance(model, ExpertClassifier):
        raise ValueError("its logits are a mean over experts, which share a stem, and timm has no such network")
    backbone = merged(model).backbone
    if has_adapters(backbone):
        raise ValueError("its blocks have bottlenecks beside their MLP (AdaptFormer), and timm has no such network")
    weight, bias = folded_head(model.head)
    options: dict[str, Any] = {"img_size": image_size} if fixed_input_size(name) else {}
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model(name, num_classes=len(weight), **options)
    layers: Any = cast("Any", network).get_classifier()  # which every network of timm has
    layers = layers if isinstance(layers, Sequence) else [layers]
    of_head = {f"{n}.{p}" for n, m in network.named_modules() if m in layers for p in ("weight", "bias")}
    missing, unexpected = network.load_state_dict(backbone.state_dict(), strict=False)
    if unexpected:
        raise ValueError(f"its backbone has {unexpected[0].rpartition('.')[0]}, which timm's {name} has not")
    if set(missing) - of_head:
        raise ValueError(
            f"timm's {name} has {sorted(set(missing) - of_head)[0]} before its classifier, which was not trained"
        )
    for layer in layers:
        _fill(layer, weight, bias, name)
    return network.eval()


def from_timm_network(state: Tensors, name: str, image_size: int, num_classes: int) -> Classifier:
    """The classifier with a linear head whose `timm_network` has these weights."""
    model = build_model(name, num_classes=num_classes, image_size=image_size)
    of_backbone = model.backbone.state_dict().keys()
    # A network of timm with two classifiers, for distillation, has been given the same weights twice.
    of_head = {key.rpartition(".")[2]: tensor for key, tensor in state.items() if key not in of_backbone}
    weight = of_head["weight"].flatten(1)
    head = {"weight": weight, "bias": of_head.get("bias", torch.zeros(len(weight)))}
    model.backbone.load_state_dict({key: state[key] for key in of_backbone})
    model.head.load_state_dict(head)
    return model


def merged(model: Classifier) -> Classifier:
    """The classifier with the adapters in its weights that can be there: a copy, or itself where it has none."""
    if adapted_layers(model):
        model = copy.deepcopy(model)
        merge_adapters(model)
    return model


def folded_head(head: Head) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) of the one linear layer that a head is. ValueError for a head that is none."""
    with torch.no_grad():
        if isinstance(head, LinearHead):
            return head.weight.clone(), head.bias.clone()
        if isinstance(head, ScaledHead):
            weight, bias = folded_head(head.inner)
            return head.scale[:, None] * weight, head.scale * bias
        if isinstance(head, RestrictedHead):
            weight, bias = folded_head(head.inner)
            known = head.known[:, None]
            return torch.where(known, weight, 0), bias.masked_fill(~head.known, float("-inf"))
    if isinstance(head, CosineHead):
        raise ValueError(
            "its head takes cosines: each image's features are divided by their length, which no linear layer does"
        )
    raise ValueError(f"its head is a {type(head).__name__}, which is no linear layer")


def is_ours(name: str) -> bool:
    """Whether the network is fastlt's: timm knows it where fastlt has been imported, and only there."""
    return name.split(".")[0] in OURS


def _fill(layer: Any, weight: Tensor, bias: Tensor, name: str) -> None:
    """Put a linear layer's weights into a classifier of timm, a linear layer or a convolution of one pixel."""
    own, shift = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not isinstance(layer, nn.Linear | nn.Conv2d) or own is None or own.numel() != weight.numel():
        raise ValueError(f"the classifier of timm's {name} is no linear layer on the features of the trained head")
    if shift is None and bias.any():
        raise ValueError(f"the classifier of timm's {name} has no bias, and the trained head has one")
    with torch.no_grad():
        own.copy_(weight.view_as(own))
        if shift is not None:
            shift.copy_(bias)
