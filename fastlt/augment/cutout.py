"""Cutout (DeVries and Taylor, arXiv 1708.04552): hide one square of each image."""

from __future__ import annotations

import torch
from torch import Tensor


def cutout(images: Tensor, top: Tensor, left: Tensor, size: int, chosen: Tensor | None = None) -> Tensor:
    """Set the square of side `size` at (top, left) of each image to 0: the data set's mean, after normalisation.

    The square may hang over the border: then only the part inside is hidden, as in the paper, where its centre is
    uniform over the image's pixels (centre c covers [c - size // 2, c - size // 2 + size)).
    images: float (N, C, H, W), changed in place and returned. top, left: int64 (N,), may be negative.
    chosen: bool (N,); images with False stay whole.
    """
    rows = _inside(top, size, images.shape[2])
    columns = _inside(left, size, images.shape[3])
    hidden = rows[:, :, None] & columns[:, None, :]
    if chosen is not None:
        hidden &= chosen[:, None, None]
    return images.masked_fill_(hidden.unsqueeze(1), 0)


def _inside(start: Tensor, size: int, length: int) -> Tensor:
    """bool (N, length): the positions in [start, start + size)."""
    position = torch.arange(length, device=start.device)
    return (position >= start[:, None]) & (position < start[:, None] + size)
