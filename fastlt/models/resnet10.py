"""ResNet-10 for ImageNet-LT (OLTR, Liu et al. 2019), registered with timm: one BasicBlock a stage, plain 7x7 stem."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        "resnet10": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 224 / 256,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


@register_model
def resnet10(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """ResNet-10: 4.9 M parameters, features (N, 512); every BatchNorm starts at scale 1, as in OLTR."""
    arguments = {"block": BasicBlock, "layers": (1, 1, 1, 1), "zero_init_last": False, **kwargs}
    return build_model_with_cfg(ResNet, "resnet10", pretrained, **arguments)
