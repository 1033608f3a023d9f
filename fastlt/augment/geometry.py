"""Moving pixels: pure functions of uint8 images (N, 3, H, W) and one parameter an image.

Crops and affine maps are one gather by a flat source position each; nothing is interpolated, so pixels stay uint8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gather_pixels(images: Tensor, source: Tensor) -> Tensor:
    """out[n, c, i, j] = images[n, c] at flat position source[n, i, j].

    images: (N, C, H, W), any dtype. source: int64 (N, h, w), in [0, H*W). Returns contiguous (N, C, h, w).
    """
    n, channels = images.shape[:2]
    flat = source.flatten(1).unsqueeze(1).expand(n, channels, -1)
    return images.flatten(2).gather(2, flat).view(n, channels, *source.shape[1:])


def flip(images: Tensor) -> Tensor:
    """Mirror every image left to right. images: (N, C, H, W)."""
    return images.flip(-1)


def pad(images: Tensor, padding: int, fill: int) -> Tensor:
    """A border of `padding` pixels of the value `fill` on all four sides; contiguous (N, C, H + 2p, W + 2p)."""
    return F.pad(images.contiguous(), (padding,) * 4, value=fill)


def crop(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """The square of side `size` at (top, left) of each image.

    images: (N, C, H, W). top, left: int64 (N,), top in [0, H - size], left in [0, W - size]. Returns contiguous
    (N, C, size, size).
    """
    steps = torch.arange(size, device=images.device)
    rows, columns = top[:, None] + steps, left[:, None] + steps
    return gather_pixels(images, rows[:, :, None] * images.shape[3] + columns[:, None, :])
