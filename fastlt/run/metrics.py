"""Evaluation on the device: counts while the batches pass, numbers once at the end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlt.losses.base import at_least_float32
from fastlt.state import ClassCounts

ECE_BINS = 15


class Metrics:
    """Accumulates what the metrics of one evaluation need, without waiting for the device.

    Everything lies in one flat float64 buffer, `state`, so that processes add theirs up with a single all-reduce:
    counts are exact in it (below 2^53), and it is small for any number of classes, which a C x C confusion matrix is
    not (8142 classes would take 530 MB).
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.state = torch.zeros(3 * num_classes + 1 + 3 * ECE_BINS, dtype=torch.float64, device=device)
        sizes = [num_classes, num_classes, num_classes, 1, ECE_BINS, ECE_BINS, ECE_BINS]
        # Views: correct, images and predictions of each class; top-5 hits; per bin confidence, correct, images.
        views = torch.split(self.state, sizes)
        self.correct, self.total, self.predicted, self.top5 = views[:4]
        self.bin_confidence, self.bin_correct, self.bin_total = views[4:]

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: logits float (N, C), labels int64 (N,) in [0, C)."""
        confidence, predicted = softmax_confidence(logits)
        self.add(predicted, confidence, in_top5(logits, labels), labels)

    def add(self, predicted: Tensor, confidence: Tensor, top5_hit: Tensor, labels: Tensor) -> None:
        """Add one batch by what was predicted: int64 (N,), its probability (N,), whether the label is in the top 5."""
        hit = (predicted == labels).double()
        one = torch.ones_like(hit)
        self.correct.index_add_(0, labels, hit)
        self.total.index_add_(0, labels, one)
        self.predicted.index_add_(0, predicted, one)
        self.top5 += top5_hit.double().sum()
        bins = confidence_bin(confidence)
        self.bin_confidence.index_add_(0, bins, confidence.double())
        self.bin_correct.index_add_(0, bins, hit)
        self.bin_total.index_add_(0, bins, one)

    def summary(self, class_counts: ClassCounts) -> dict[str, Any]:
        """The metrics as fractions in [0, 1]; this is where the device is waited for.

        top1, top5 (top min(5, C)): over images. ece: expected calibration error, 15 equal-width bins (Guo et al. 2017).
            None when a confidence was not finite.
        many, medium, few: mean accuracy of the group's classes by training-set size. On the balanced test sets of the
        field this equals the mean over their images; on others every class counts the same. None for an empty group.
        balanced_accuracy, macro_f1: mean accuracy and mean F1 of all classes.
        A class without an evaluated image is left out of these means, and its entry in per_class_accuracy is None.
        classes_evaluated: how many classes the means are over, of "all" and of each group.
        """
        state = Metrics(self.num_classes)
        state.state.copy_(self.state)
        correct, total, predicted = (t.numpy() for t in (state.correct, state.total, state.predicted))
        images = total.sum()
        if images == 0:
            raise ValueError("there is nothing to summarise: no image was evaluated")
        present = total > 0
        accuracy = np.divide(correct, total, out=np.full_like(correct, np.nan), where=present)
        f1 = 2 * correct[present] / (total[present] + predicted[present])
        ece = float((state.bin_confidence - state.bin_correct).abs().sum().item() / images)
        members = {name: mask & present for name, mask in class_counts.shot_masks().items()}
        return {
            "top1": float(correct.sum() / images),
            "top5": float(state.top5.item() / images),
            **{name: _mean(accuracy[inside]) for name, inside in members.items()},
            "balanced_accuracy": _mean(accuracy[present]),
            "macro_f1": float(f1.mean()),
            "ece": ece if math.isfinite(ece) else None,
            "per_class_accuracy": [None if np.isnan(a) else float(a) for a in accuracy],
            "classes_evaluated": {name: int(inside.sum()) for name, inside in {"all": present, **members}.items()},
        }


def softmax_confidence(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest softmax probability (N,) and its class int64 (N,) for logits (N, C)."""
    logits = at_least_float32(logits)
    top, predicted = logits.max(dim=1)
    return torch.exp(top - torch.logsumexp(logits, dim=1)), predicted


def in_top5(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label is among the min(5, C) largest logits: bool (N,)."""
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1)


def confidence_bin(confidence: Tensor) -> Tensor:
    """The bin of each confidence in [0, 1]: int64 (N,); bin k is the interval (k/15, (k+1)/15]."""
    return (torch.ceil(confidence.double() * ECE_BINS).long() - 1).clamp_(0, ECE_BINS - 1)


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None
