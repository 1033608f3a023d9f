"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899): pure functions of one batch.

Both return (images, labels_a, labels_b, lam), for the loss lam * loss(labels_a) + (1 - lam) * loss(labels_b). There is
one lam a batch, from Beta(alpha, alpha), and the partner of an image is another of the same batch, by a permutation, as
in both papers' code. Everything random comes from the host generator; nothing is read back from the device.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastlt.state import upload


def sample_lam(alpha: float, generator: torch.Generator) -> float:
    """One draw from Beta(alpha, alpha), in [0, 1]; 1 (nothing mixed) for alpha = 0."""
    if alpha < 0:
        raise ValueError(f"mixup's alpha is {alpha}: it must be 0 (no mixing) or more; 1.0 and 0.2 are common")
    if alpha == 0:
        return 1.0
    # torch has no Beta draw that takes a generator; NumPy's also survives a tiny alpha, where a ratio of Gammas is 0/0.
    seed = torch.randint(1 << 62, (1,), generator=generator).numpy()
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def mixup(
    images: Tensor, labels: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blend every image with another of the batch: lam * x + (1 - lam) * x[partner].

    images: float (N, C, H, W), normalised; not changed. labels: int64 (N,). generator: on the host. Returns the mixed
    images (same dtype and memory format), labels, the partners' labels, and lam: 0-d float32 on the images' device.
    """
    lam = sample_lam(alpha, generator)
    partner = _partners(images, generator)
    mixed = torch.lerp(images, images[partner], 1 - lam)
    return mixed, labels, labels[partner], torch.full((), lam, device=images.device)


def cutmix(
    images: Tensor, labels: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Paste one rectangle, the same for the whole batch, from another image of the batch.

    The rectangle has sides sqrt(1 - lam) of the image's, its centre is uniform, and what hangs over is clipped; lam is
    then set to the share of pixels that is still the image's own. Arguments and results as `mixup`.
    """
    height, width = images.shape[-2:]
    lam = sample_lam(alpha, generator)
    partner = _partners(images, generator)
    top, bottom, left, right = cutmix_box(height, width, lam, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return mixed, labels, labels[partner], torch.full((), kept, device=images.device)


def cutmix_box(height: int, width: int, lam: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the rectangle, within the image; empty for lam = 1."""
    share = math.sqrt(1 - lam)
    box_height, box_width = int(height * share), int(width * share)
    centre_y, centre_x = (int(torch.randint(side, (1,), generator=generator).numpy()[0]) for side in (height, width))
    top, left = centre_y - box_height // 2, centre_x - box_width // 2
    bottom, right = centre_y + box_height // 2, centre_x + box_width // 2
    return max(top, 0), min(bottom, height), max(left, 0), min(right, width)


def _partners(images: Tensor, generator: torch.Generator) -> Tensor:
    """A permutation of the batch, int64 (N,), on the images' device."""
    return upload(torch.randperm(images.shape[0], generator=generator), images.device)
