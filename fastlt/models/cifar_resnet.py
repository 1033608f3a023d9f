"""ResNets for 32x32 images (He et al. 2016, Sec. 4.2), registered with timm as cifar_resnet8 ... cifar_resnet56."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F

# Public in timm, which does not say so in a way that type checkers read.
from timm.layers import (
    DropPath,  # pyright: ignore[reportPrivateImportUsage]
    SelectAdaptivePool2d,  # pyright: ignore[reportPrivateImportUsage]
    create_classifier,  # pyright: ignore[reportPrivateImportUsage]
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["CifarResNet"]

WIDTHS = (16, 32, 64)


class ZeroPadShortcut(nn.Module):
    """He et al.'s option A: every second pixel, zeros for the channels that are new; it has no parameters.

    The zeros are split evenly before and after the input's channels, as in the long-tail literature's ResNet-32
    (LDAM's and its descendants'); a shortcut with a convolution would be another network with more parameters.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.before = (out_channels - in_channels) // 2
        self.after = out_channels - in_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class CifarBlock(nn.Module):
    """conv-bn-relu-conv-bn, plus the shortcut, relu."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        drop_path: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        convolution = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False, device=device, dtype=dtype)
        batch_norm = partial(nn.BatchNorm2d, device=device, dtype=dtype)
        self.conv1 = convolution(in_channels, out_channels, stride=stride)
        self.bn1 = batch_norm(out_channels)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = convolution(out_channels, out_channels)
        self.bn2 = batch_norm(out_channels)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ZeroPadShortcut(in_channels, out_channels, stride)
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(self.drop_path(y) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels with `blocks` blocks each: depth 6 * blocks + 2.

    Input (N, in_chans, H, W), usually 32x32; pooled features (N, 64). Convolutions start as in He et al. 2015.
    channels: of the three stages, for other widths.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        channels: tuple[int, int, int] = WIDTHS,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, device=device, dtype=dtype)
        self.bn1 = nn.BatchNorm2d(channels[0], device=device, dtype=dtype)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, int | str]] = []
        stages: list[nn.Sequential] = []
        inputs, depth, index = channels[0], 3 * blocks, 0
        for stage, width in enumerate(channels, start=1):
            layers = []
            for block in range(blocks):
                stride = 2 if stage > 1 and block == 0 else 1
                # Stochastic depth grows linearly with depth, from 0 at the first block.
                drop_path = drop_path_rate * index / max(depth - 1, 1)
                layers.append(CifarBlock(inputs, width, stride, drop_path, device, dtype))
                inputs, index = width, index + 1
            stages.append(nn.Sequential(*layers))
            self.feature_info.append({"num_chs": width, "reduction": 2 ** (stage - 1), "module": f"layer{stage}"})
        self.layer1, self.layer2, self.layer3 = stages
        self.num_features = self.head_hidden_size = inputs
        self.global_pool, self.fc = _pool_and_classifier(inputs, num_classes, global_pool, device, dtype)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def get_classifier(self) -> nn.Module:
        """The last linear layer (nn.Identity when num_classes is 0)."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a new one for `num_classes` classes, none when it is 0."""
        self.num_classes = num_classes
        like = self.conv1.weight
        pool = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = _pool_and_classifier(self.num_features, num_classes, pool, like.device, like.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (N, 64, H/4, W/4)."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool, drop out, classify; `pre_logits` stops before the last layer."""
        x = self.global_pool(x)
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _pool_and_classifier(
    num_features: int,
    num_classes: int,
    pool_type: str,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> tuple[SelectAdaptivePool2d, nn.Module]:
    """The pooling and the last layer: from feature maps (N, 64, H/4, W/4) to (N, 64), then to (N, num_classes)."""
    made = create_classifier(num_features, num_classes, pool_type=pool_type, device=device, dtype=dtype)
    # The stub also has a triple, which timm returns where it is given a dropout rate.
    return cast("tuple[SelectAdaptivePool2d, nn.Module]", made)


def _cfg() -> dict[str, Any]:
    # The statistics are CIFAR-10's; there are no pretrained weights.
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs({f"cifar_resnet{depth}": _cfg() for depth in (8, 20, 32, 44, 56)})


def _create(name: str, pretrained: bool, blocks: int, **kwargs: Any) -> CifarResNet:
    return build_model_with_cfg(
        CifarResNet, name, pretrained, blocks=blocks, feature_cfg={"out_indices": (0, 1, 2)}, **kwargs
    )


@register_model
def cifar_resnet8(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-8: 0.08 M parameters, for tests and trials."""
    return _create("cifar_resnet8", pretrained, 1, **kwargs)


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20: 0.27 M parameters."""
    return _create("cifar_resnet20", pretrained, 3, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32: 0.46 M parameters, the network of every CIFAR-LT table."""
    return _create("cifar_resnet32", pretrained, 5, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44: 0.66 M parameters."""
    return _create("cifar_resnet44", pretrained, 7, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56: 0.85 M parameters."""
    return _create("cifar_resnet56", pretrained, 9, **kwargs)
