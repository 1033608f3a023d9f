"""Per-sample losses: `build_loss(name, class_counts, **options)`."""

from fastlt.losses.base import PerSampleLoss
from fastlt.losses.factory import LOSSES, build_loss, check_loss

__all__ = ["LOSSES", "PerSampleLoss", "build_loss", "check_loss"]
