"""`build_model`: any timm backbone with one of our heads, optionally from pretrained weights."""

from __future__ import annotations

import difflib
from pathlib import Path

import timm
from torch import Tensor, nn

from fastlt.models.checkpoints import load_weights
from fastlt.models.heads import HEADS
from fastlt.names import pick

OURS = ("cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56", "resnet10")


class Classifier(nn.Module):
    """A backbone that ends in pooled features, dropout, and a head.

    `forward` takes images (N, 3, H, W) to logits (N, C), `features` to pooled features (N, D) before the dropout.
    `head_is_trained` says whether the head's weights came from a file. `auxiliary` is what a method trains beside the
    two and evaluation does without (a projection, say); it is in the state_dict only where a method has put it there.
    """

    head_is_trained = False

    def __init__(self, backbone: nn.Module, head: nn.Module, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        # A module and not the backbone's own: timm's is often a bare function call, which nothing can see from outside.
        self.dropout = nn.Dropout(drop_rate) if drop_rate > 0 else nn.Identity()
        self.register_module("auxiliary", None)

    def features(self, images: Tensor) -> Tensor:
        """Pooled features (N, D) of images (N, 3, H, W)."""
        return self.backbone(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)))


def build_model(
    name: str,
    *,
    num_classes: int,
    head: str = "linear",
    head_scale: float | None = None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    image_size: int | None = None,
) -> Classifier:
    """A classifier of `num_classes` classes on the timm backbone `name` (ours are registered with timm too).

    head: "linear", or "cosine" with the scale `head_scale` (30 unless given).
    pretrained: the weights timm knows for this name, over the network; the head is new.
    checkpoint: a local file instead, see `load_weights`.
    drop_rate: dropout before the head. drop_path_rate: stochastic depth, for backbones that have it.
    image_size: for backbones that are built for one input size (ViT, Swin, ...); others take any size and ignore it.
    Raises ValueError for an unknown name, a name without pretrained weights, or an option the backbone does not take.
    """
    check_model(name, pretrained)
    if pretrained and checkpoint is not None:
        raise ValueError("give either pretrained=True or a checkpoint, not both: the second would overwrite the first")
    options: dict = {"num_classes": 0, "pretrained": pretrained}
    if image_size is not None and _fixed_input_size(name):
        options["img_size"] = image_size
    backbone = _create_backbone(name, drop_path_rate, options)
    width = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    head_type = pick("head", head, HEADS)
    if head_scale is not None and head != "cosine":
        raise ValueError(f"head_scale belongs to head: cosine; the {head} head has no scale")
    head_options = {} if head_scale is None else {"scale": head_scale}
    classifier = Classifier(backbone, head_type(width, num_classes, **head_options), drop_rate)
    if checkpoint is not None:
        load_weights(classifier, checkpoint)
    return classifier


def forward_mode_safe(model: nn.Module) -> nn.Module:
    """Make every attention layer of `model` take the path that has forward-mode derivatives; returns `model`.

    Fused scaled-dot-product kernels have a backward but no forward-mode formula; timm's attention layers carry a switch
    to the plain matrix products. Changes `model` in place; numerics stay the same up to rounding.
    """
    for module in model.modules():
        if getattr(module, "fused_attn", False):
            module.fused_attn = False
    return model


def _create_backbone(name: str, drop_path_rate: float, options: dict) -> nn.Module:
    # The rate is given even when it is 0: some networks of timm (Swin) have another default.
    try:
        return timm.create_model(name, drop_path_rate=drop_path_rate, **options)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        if drop_path_rate:
            raise ValueError(f"{name} has no stochastic depth: leave drop_path_rate at 0") from error
    return timm.create_model(name, **options)


def _fixed_input_size(name: str) -> bool:
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def check_model(name: str, pretrained: bool = False) -> None:
    """Refuse a name that no backbone has, and pretrained weights that timm does not know, by a ValueError."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "."
        raise ValueError(
            f"unknown model {name!r}{hint} Ours are {', '.join(OURS)}; every name of timm.list_models() can be used"
        )
    cfg = timm.get_pretrained_cfg(name)
    if pretrained and not (cfg and cfg.has_weights):
        raise ValueError(
            f"{name} has no pretrained weights: set pretrained: false, give a local file as checkpoint, or choose a "
            "name of timm.list_pretrained()"
        )
