"""The mean over shifted crops of an image, for the test: LIFT's test-time ensembling (Shi et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def shifted_crops(images: Tensor, size: int) -> list[Tensor]:
    """The four corners and the centre of images (N, C, H, W): five views (N, C, size, size).

    The images themselves, alone, where they have this size.
    """
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return [images]
    bottom, right = height - size, width - size
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return [images[..., top : top + size, left : left + size] for top, left in places]


def mean_logits(model: Callable[[Tensor], Tensor], images: Tensor, size: int) -> Tensor:
    """The mean of the logits of `shifted_crops`, in float32 at least where there are several: (N, classes)."""
    crops = shifted_crops(images, size)
    if len(crops) == 1:
        return model(images)
    total = torch.zeros(())
    for number, crop in enumerate(crops):
        logits = model(crop)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = wide if number == 0 else total + wide
    return total / len(crops)
