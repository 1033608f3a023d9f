"""What was predicted: one object an image, all of them together, and the CSV and JSON files of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from fastlt.inference.inputs import Unreadable
from loaders.sources.messages import one_line, printable


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, the first the most probable.

    source: path of the image; None for one that was given as pixels. position: among the images that were given.
    names, indices, probabilities: of the `top` classes.
    abstained: whether the first probability is below the threshold that was asked for.
    """

    source: str | None
    position: int
    names: tuple[str, ...]
    indices: tuple[int, ...]
    probabilities: tuple[float, ...]
    abstained: bool = False

    @property
    def name(self) -> str | None:
        """The predicted class; None where the network abstained."""
        return None if self.abstained else self.names[0]

    @property
    def index(self) -> int | None:
        """The number of the predicted class; None where the network abstained."""
        return None if self.abstained else self.indices[0]

    @property
    def probability(self) -> float:
        """Of the most probable class, also where the network abstained."""
        return self.probabilities[0]

    @property
    def called(self) -> str:
        """Its path, as it can be printed; its position where it has none."""
        return str(self.position) if self.source is None else printable(self.source)

    def __str__(self) -> str:
        ranked = zip(self.names, self.probabilities, strict=True)
        said = ", ".join(f"{name} {100 * p:.1f} %" for name, p in ranked)
        where = f"image {self.position}" if self.source is None else one_line(self.source)
        return f"{where}: {'abstained; ' if self.abstained else ''}{said}"


class Predictions(Sequence[Prediction]):
    """The predictions of the images that could be read, in their order, and the images that could not.

    classes: C names. sources, positions: of each image, as in `Prediction`.
    indices: int64 (N, k), probabilities: float32 (N, k), of the k most probable classes, in falling order.
    threshold: below which the network abstains; None when it always predicts.
    unreadable: the images that could not be read, with the reasons.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        sources: Sequence[str | None],
        positions: np.ndarray,
        indices: np.ndarray,
        probabilities: np.ndarray,
        threshold: float | None,
        unreadable: Sequence[Unreadable],
    ) -> None:
        self.classes, self.sources, self.positions = classes, tuple(sources), positions
        self.indices, self.probabilities = indices, probabilities
        self.threshold, self.unreadable = threshold, tuple(unreadable)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, i: int) -> Prediction: ...
    @overload
    def __getitem__(self, i: slice) -> list[Prediction]: ...
    def __getitem__(self, i: int | slice) -> Prediction | list[Prediction]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(f"prediction {i} of {len(self)}")
        indices = tuple(self.indices[i].tolist())
        return Prediction(
            source=self.sources[i],
            position=int(self.positions[i]),
            names=tuple(self.classes[k] for k in indices),
            indices=indices,
            probabilities=tuple(self.probabilities[i].tolist()),
            abstained=bool(self.abstained[i]),
        )

    def __iter__(self) -> Iterator[Prediction]:
        return (self[i] for i in range(len(self)))

    @property
    def abstained(self) -> np.ndarray:
        """Where the network abstained, bool (N,)."""
        if self.threshold is None:
            return np.zeros(len(self), dtype=bool)
        return self.probabilities[:, 0] < self.threshold

    @property
    def names(self) -> list[str | None]:
        """The predicted class of each image; None where the network abstained."""
        return [one.name for one in self]

    @property
    def coverage(self) -> float:
        """The share of the readable images for which the network did not abstain; NaN without any."""
        return float(1 - self.abstained.mean()) if len(self) else float("nan")

    def to_csv(self) -> str:
        """One line an image, with a head; the images that could not be read are at the end, with their reason.

        image, prediction, probability, then class_k and probability_k of the k-th class, then error. The prediction is
        empty where the network abstained. An image without a path is called by its position.
        """
        top = self.indices.shape[1]
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        ranked = [f"{what}_{k}" for k in range(1, top + 1) for what in ("class", "probability")]
        lines.writerow(["image", "prediction", "probability", *ranked, "error"])
        for one in self:
            of_classes = [
                cell for name, p in zip(one.names, one.probabilities, strict=True) for cell in (name, f"{p:.6g}")
            ]
            lines.writerow([one.called, one.name or "", f"{one.probability:.6g}", *of_classes, ""])
        for one in self.unreadable:
            lines.writerow([one.called, "", "", *[""] * len(ranked), one.reason])
        return text.getvalue()

    def to_tree(self) -> dict[str, Any]:
        """Plain containers, for JSON: coverage, the predictions, and the images that could not be read."""
        return {
            "abstain_below": self.threshold,
            "coverage": self.coverage,
            "predictions": [
                {
                    "image": one.called,
                    "prediction": one.name,
                    "abstained": one.abstained,
                    "classes": list(one.names),
                    "indices": list(one.indices),
                    "probabilities": list(one.probabilities),
                }
                for one in self
            ],
            "unreadable": self.unreadable_tree(),
        }

    def unreadable_tree(self) -> list[dict[str, str]]:
        """The images that could not be read, for JSON."""
        return [{"image": one.called, "reason": one.reason} for one in self.unreadable]
