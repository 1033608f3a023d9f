"""Batched augmentation on the training device: uint8 images in, normalised floats out."""

from fastlt.augment.mixup import cutmix, mixup
from fastlt.augment.pipeline import AUGMENTATIONS, Augment, build_augment, check_augment, normalise

__all__ = ["AUGMENTATIONS", "Augment", "build_augment", "check_augment", "cutmix", "mixup", "normalise"]
