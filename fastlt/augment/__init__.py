"""Batched augmentation on the training device: uint8 images in, normalised floats out."""

from fastlt.augment.mixup import cutmix, mixup
from fastlt.augment.pipeline import (
    AUGMENTATIONS,
    Augment,
    Unchanged,
    build_augment,
    check_augment,
    check_mean,
    check_std,
    normalise,
    output_size,
)

__all__ = [
    "AUGMENTATIONS",
    "Augment",
    "Unchanged",
    "build_augment",
    "check_augment",
    "check_mean",
    "check_std",
    "cutmix",
    "mixup",
    "normalise",
    "output_size",
]
