"""What a model predicts for every image of a split: its likeliest classes, kept with the result of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlt.losses.base import at_least_float32
from fastlt.run.atomic_file import atomic_file
from fastlt.run.metrics import softmax_confidence
from loaders.stored.damage import DamageError, read_arrays

TOP = 5
PREDICTED_SPLITS = ("test", "meta")
FIELDS = ("index", "labels", "classes", "probabilities")


@dataclass(frozen=True)
class Predictions:
    """Of the images of a split, each once, in the order of the split.

    index: int64 (N,), each image's position in its split.
    labels: int64 (N,), in [0, C).
    classes: int64 (N, K), the K = min(5, C) likeliest classes, the likeliest first; metrics count the first.
    probabilities: float32 (N, K), softmax probabilities of these classes.
    """

    index: np.ndarray
    labels: np.ndarray
    classes: np.ndarray
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def merged(cls, parts: Sequence[tuple[np.ndarray, ...]]) -> Predictions:
        """One from the fields of several parts, as of processes; an image that is in two of them is taken once."""
        index, labels, classes, probabilities = (np.concatenate(column) for column in zip(*parts, strict=True))
        index, first = np.unique(index, return_index=True)
        return cls(index, labels[first], classes[first], probabilities[first])

    @property
    def predicted(self) -> np.ndarray:
        """The likeliest class of each image: int64 (N,)."""
        return self.classes[:, 0]

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the likeliest class: float32 (N,)."""
        return self.probabilities[:, 0]

    @property
    def right(self) -> np.ndarray:
        """Whether the likeliest class is the label: bool (N,)."""
        return self.predicted == self.labels


class PredictionRecorder:
    """Collects the predictions of one process batch by batch, on the device and without waiting for it."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, ...]] = []

    def add(self, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        """Add one batch: logits float (N, C); labels and index int64 (N,)."""
        self.batches.append((index, labels, *top_predictions(logits)))

    def parts(self) -> list[tuple[np.ndarray, ...]]:
        """What `Predictions.merged` takes of this process: one part, or none without a batch. Waits for the device."""
        if not self.batches:
            return []
        return [tuple(torch.cat(column).cpu().numpy() for column in zip(*self.batches, strict=True))]


@torch.no_grad()
def top_predictions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest classes int64 (N, K) and their probabilities float32 (N, K) of logits (N, C).

    The first of each are those of `softmax_confidence`, bit for bit, also where logits tie.
    """
    _, predicted = softmax_confidence(logits)
    logits = at_least_float32(logits)
    values, classes = logits.topk(min(TOP, logits.shape[1]), dim=1)
    # Of equal logits `topk` may put another first than `max` does: the two change places.
    classes = torch.where(classes == predicted[:, None], classes[:, :1], classes)
    classes[:, 0] = predicted
    return classes, torch.exp(values - torch.logsumexp(logits, dim=1, keepdim=True)).float()


def write_predictions(path: Path, splits: Mapping[str, Predictions]) -> None:
    """Write an .npz file of the predictions by split, atomically; RunFileError where it cannot be written.

    Labels and classes take two bytes each up to 65,536 classes.
    """
    arrays = {}
    for split, of_split in splits.items():
        small = np.uint16 if max(of_split.labels.max(), of_split.classes.max()) < 1 << 16 else np.int32
        arrays[f"{split}_index"] = of_split.index.astype(np.int32)
        arrays[f"{split}_labels"] = of_split.labels.astype(small)
        arrays[f"{split}_classes"] = of_split.classes.astype(small)
        arrays[f"{split}_probabilities"] = of_split.probabilities
    with atomic_file(path, needed=lambda: sum(array.nbytes for array in arrays.values())) as file:
        np.savez(file, allow_pickle=False, **arrays)


def read_predictions(path: Path) -> dict[str, Predictions]:
    """The predictions by split; DamageError when the file is not what `write_predictions` wrote."""
    arrays = read_arrays(path, [f"{split}_{field}" for split in PREDICTED_SPLITS for field in FIELDS])
    found = {split: _predictions(arrays, split) for split in PREDICTED_SPLITS}
    for split, of_split in found.items():
        same = of_split.classes.shape == of_split.probabilities.shape
        if not same or not len(of_split) == len(of_split.labels) == len(of_split.classes):
            raise DamageError(f"the arrays of {split!r} differ in length")
    return found


def _predictions(arrays: Mapping[str, np.ndarray], split: str) -> Predictions:
    index, labels, classes = (arrays[f"{split}_{field}"].astype(np.int64) for field in FIELDS[:3])
    return Predictions(index, labels, classes, arrays[f"{split}_probabilities"])
