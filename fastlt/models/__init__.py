"""Backbones and heads; importing this registers ours with timm."""

from fastlt.models import cifar_resnet, resnet10  # noqa: F401  (registers)
from fastlt.models.classifier import Classifier, ExpertClassifier, build_model, check_model, forward_mode_safe, head_of
from fastlt.models.heads import HEADS, CosineHead, Head, LinearHead
from fastlt.models.padded_pooling import check_padded_pooling

__all__ = [
    "HEADS",
    "Classifier",
    "CosineHead",
    "ExpertClassifier",
    "Head",
    "LinearHead",
    "build_model",
    "check_model",
    "check_padded_pooling",
    "forward_mode_safe",
    "head_of",
]
