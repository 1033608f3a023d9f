"""A data set read from the source's own files, without a conversion: for a look at it, or where it fits on the device.

It answers what a ConvertedDataset answers. Every image is decoded once when it is opened, as in a conversion: what is
damaged is known by path before the first batch, and how large each image is.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastlt.names import pick
from loaders.sources.source import Source
from loaders.sources.split import SPLITS, EncodedImages, Split
from loaders.stored import SOURCE_FILES
from loaders.stored.damage import DamageError
from loaders.stored.identity import Content, DatasetIdentity, content_sha256
from loaders.stored.image_check import (
    ImageCheck,
    check_source,
    duplicate_notes,
    refuse_bad_images,
    refuse_empty_classes,
    refuse_same_contents,
    same_contents,
)

if TYPE_CHECKING:
    from fastlt.state import ClassCounts, ShotRanks


class SourceSplit:
    """A StoredSplit over the source's images.

    path: what to call it in messages.
    labels, heights, widths: int64 (N,).
    """

    in_memory = False

    def __init__(self, path: Path, split: Split, sizes: np.ndarray) -> None:
        self.path, self.split = path, split
        self.labels = split.labels
        self.heights, self.widths = (np.ascontiguousarray(side) for side in sizes.T)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, i: int) -> np.ndarray:
        """Image `i` as RGB uint8 (H, W, 3); DamageError naming it when its file was changed or damaged meanwhile."""
        try:
            image = self.split.image(i)
        except ValueError as error:
            raise DamageError(f"{self.split.name(i)}: {error}") from error
        expected = (self.heights[i], self.widths[i], 3)
        if image.shape != expected:
            raise DamageError(
                f"{self.split.name(i)}: it was changed after the run began ({image.shape}, not {expected})"
            )
        return image

    def encoded(self, i: int) -> np.ndarray:
        """Image `i` as a JPEG file, the source's own bytes where it has them, else as a PNG file: uint8 (n,)."""
        data = self.split.encoded(i)
        if data is None:
            from PIL import Image

            file = io.BytesIO()
            Image.fromarray(self.image(i)).save(file, "PNG", compress_level=1)
            data = file.getvalue()
        return np.frombuffer(data, dtype=np.uint8)

    def content(self, i: int) -> Content:
        """What image `i` is made from: the bytes of its file, or its pixels where the source has no file for it."""
        if not isinstance(self.split, EncodedImages):
            return np.ascontiguousarray(self.split.image(i)).reshape(-1)
        try:
            return self.split.contents(i)
        except ValueError as error:
            raise DamageError(f"{self.split.name(i)}: {error}") from None


class UnconvertedDataset:
    """The splits of a source, ready for `make_loader` and the trainer.

    root: where the data are, for messages.
    checks: what `image_check.check_source` found for each split.
    notes: what the user should know, one line each.
    Raises ValueError that lists the images that cannot be decoded, or files of equal contents in two splits.
    """

    formats = (SOURCE_FILES,)

    def __init__(self, source: Source, root: Path, checks: Mapping[str, ImageCheck]) -> None:
        refuse_bad_images(source.splits, checks)
        refuse_empty_classes(source.splits, checks, source.class_names)
        duplicates = same_contents(source.splits, checks)
        refuse_same_contents(source.splits, duplicates)
        self.notes = (*source.notes, *duplicate_notes(source.splits, duplicates))
        self.root, self.class_names = root, source.class_names
        self._splits = {name: SourceSplit(root, split, checks[name].sizes) for name, split in source.splits.items()}

    @classmethod
    def open(
        cls, source: Source, root: Path, *, num_workers: int | None = None, progress: bool = True
    ) -> UnconvertedDataset:
        """Decode every image once, on `num_workers` processes (None: all cores), and open the splits."""
        return cls(source, root, check_source(source, num_workers=num_workers, progress=progress))

    @property
    def place(self) -> str:
        """Where it is, as users call it."""
        return str(self.root)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, int64 (N,)."""
        return self.stored(split).labels

    def class_counts(self, shots: tuple[int, int] | ShotRanks = (100, 20)) -> ClassCounts:
        """Training images per class, as `ConvertedDataset.class_counts`."""
        from fastlt.state import ClassCounts

        counts = np.bincount(self.labels("train"), minlength=self.num_classes).astype(np.int64)
        return ClassCounts(counts, self.class_names, shots)

    def stamps(self) -> dict[str, list[int]]:
        """None: whether a file is another one is seen by its content, which is read at every start."""
        return {}

    def identity(
        self,
        known: DatasetIdentity | None = None,
        stamps: Mapping[str, Sequence[int]] | None = None,
        *,
        progress: bool = True,
        say: Callable[[str], object] = lambda text: None,
    ) -> DatasetIdentity:
        """Which images this is; every file is read, as it was when the source was opened. `known` is not needed."""
        contents = {name: content_sha256(split, split.content) for name, split in self._splits.items()}
        labels = {name: self._splits[name].labels for name in SPLITS}
        return DatasetIdentity.of(self.class_names, labels, {SOURCE_FILES: contents})

    def stored(self, split: str, kind: str = SOURCE_FILES) -> SourceSplit:
        """The images of a split; `kind` is as in ConvertedDataset, where there are several."""
        assert kind in self.formats, kind
        return pick("split", split, self._splits)
