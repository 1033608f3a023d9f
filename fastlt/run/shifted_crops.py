"""The mean over shifted crops of an image, for the test: LIFT's test-time ensembling (Shi et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms.functional import five_crop

from fastlt.losses.base import at_least_float32


def mean_logits(model: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """The mean of the logits of the crops (N, C, size, size) at the corners and the centre: (N, classes).

    In float32 at least; images (N, C, H, W) that have this size are their only crop, and the logits are the model's.
    """
    if images.shape[-2:] == (size, size):
        return model(images)
    total = torch.zeros(())
    crops = five_crop(images, [size, size])
    for number, crop in enumerate(crops):
        wide = at_least_float32(model(crop))
        total = wide if number == 0 else total + wide
    return total / len(crops)
