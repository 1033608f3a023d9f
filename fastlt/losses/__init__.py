"""Per-sample losses: `build_loss(name, class_counts, **options)`."""

from fastlt.losses.cross_entropy import BalancedSoftmax, CrossEntropy
from fastlt.losses.factory import LOSSES, build_loss

__all__ = ["LOSSES", "BalancedSoftmax", "CrossEntropy", "build_loss"]
