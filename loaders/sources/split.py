"""Where images come from, seen from above: a numbered sequence of labelled images, in memory or in files."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.sources.decode import decode_bytes, plain_jpeg, read_image_file

SPLITS = ("train", "meta", "test")  # of every source
UNREADABLE = (-1, -1)  # the stamp of an image that cannot be read
# What data sets call them, in small letters.
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("meta", "val", "valid", "validation", "dev"), "meta"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Split(Protocol):
    """A numbered sequence of labelled images."""

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), in [0, C)."""
        ...

    @property
    def provenance(self) -> str:
        """One line that says where these images come from."""
        ...

    def __len__(self) -> int: ...

    def image(self, i: int) -> np.ndarray:
        """Image i decoded: uint8 (H, W, 3) RGB; ValueError with the reason when it cannot be decoded."""
        ...

    def encoded(self, i: int) -> bytes | None:
        """The untouched JPEG bytes of image i when the source has them and they decode to `image(i)`, else None."""
        ...

    def name(self, i: int) -> str:
        """What to call image i in a message: its path, or its place in the archive."""
        ...

    def stamp(self, i: int) -> tuple[int, int]:
        """Two numbers that are others when image i is another one: its length, and its time of change or a digest.

        (-1, -1) for what cannot be read. Nothing is decoded.
        """
        ...

    def subset(self, indices: np.ndarray) -> Split:
        """The images at `indices`, int64 (K,), in that order."""
        ...


@dataclass(frozen=True)
class ArraySplit:
    """Images of one size, held in memory.

    pixels: uint8 (P, H, W, 3) RGB, shared between subsets.
    labels: int64 (N,).
    rows: int64 (N,), the row of `pixels` that holds image i.
    origin: what the rows of `pixels` are called in messages: `origin[row]`.
    """

    pixels: np.ndarray
    labels: np.ndarray
    rows: np.ndarray
    origin: str
    provenance: str

    def __post_init__(self) -> None:
        assert self.pixels.dtype == np.uint8, self.pixels.dtype
        assert self.pixels.ndim == 4, self.pixels.shape
        assert self.pixels.shape[3] == 3, self.pixels.shape
        assert self.labels.dtype == np.int64, self.labels.dtype
        assert len(self.labels) == len(self.rows)

    @classmethod
    def whole(cls, pixels: np.ndarray, labels: np.ndarray, *, origin: str, provenance: str) -> ArraySplit:
        """Every row of `pixels`, in order."""
        return cls(pixels, labels.astype(np.int64), np.arange(len(pixels)), origin, provenance)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W), the same for all images."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def image(self, i: int) -> np.ndarray:
        return self.pixels[self.rows[i]]

    def encoded(self, i: int) -> bytes | None:
        return None

    def name(self, i: int) -> str:
        return f"{self.origin}[{self.rows[i]}]"

    def stamp(self, i: int) -> tuple[int, int]:
        return _stamp_of(np.ascontiguousarray(self.image(i)).data)

    def subset(self, indices: np.ndarray) -> ArraySplit:
        return replace(self, labels=self.labels[indices], rows=self.rows[indices])


class EncodedImages(ABC):
    """Images as JPEG, PNG, … files, wherever these lie, decoded when asked for.

    root: the folder that holds the data.
    labels: int64 (N,).
    provenance: as of Split.
    """

    root: Path
    labels: np.ndarray
    provenance: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def contents(self, i: int) -> bytes:
        """The file of image i; ValueError with the reason when it cannot be read."""

    @abstractmethod
    def name(self, i: int) -> str:
        """As of Split."""

    @abstractmethod
    def listed(self, i: int) -> str:
        """What image i is called within the data set, the same wherever that lies."""

    @abstractmethod
    def subset(self, indices: np.ndarray, provenance: str | None = None) -> EncodedImages:
        """As of Split; provenance: of the subset, None for that of the whole."""

    def image(self, i: int) -> np.ndarray:
        """As of Split."""
        return decode_bytes(self.contents(i))

    def encoded(self, i: int) -> bytes | None:
        """As of Split."""
        return plain_jpeg(self.contents(i))

    def stamp(self, i: int) -> tuple[int, int]:
        """As of Split; by the bytes of the file where nothing quicker is known."""
        try:
            return _stamp_of(self.contents(i))
        except ValueError:
            return UNREADABLE


@dataclass(frozen=True)
class FileSplit(EncodedImages):
    """Images in files below a folder.

    root: the folder that `paths` are relative to.
    """

    root: Path
    paths: Sequence[str]
    labels: np.ndarray
    provenance: str

    def __post_init__(self) -> None:
        assert self.labels.dtype == np.int64, self.labels.dtype
        assert len(self.labels) == len(self.paths)

    def contents(self, i: int) -> bytes:
        return read_image_file(self.root / self.paths[i])

    def name(self, i: int) -> str:
        return str(self.root / self.paths[i])

    def listed(self, i: int) -> str:
        return self.paths[i]

    def stamp(self, i: int) -> tuple[int, int]:
        return file_stamp(os.path.join(self.root, self.paths[i]))

    def subset(self, indices: np.ndarray, provenance: str | None = None) -> FileSplit:
        paths, where = [self.paths[i] for i in indices], self.provenance if provenance is None else provenance
        return replace(self, paths=paths, labels=self.labels[indices], provenance=where)


def called(split: Split, i: int) -> str:
    """What image i of a split is called, wherever the data lie where they are files."""
    return split.listed(i) if isinstance(split, EncodedImages) else split.name(i)


def file_stamp(path: str) -> tuple[int, int]:
    """(length, time of the last change in ns) of a file, links followed."""
    try:
        status = os.stat(path)
    except OSError:
        return UNREADABLE
    return status.st_size, status.st_mtime_ns


def _stamp_of(data: bytes | memoryview) -> tuple[int, int]:
    digest = hashlib.sha1(data, usedforsecurity=False).digest()
    return len(memoryview(data).cast("B")), int.from_bytes(digest[:7], "little")
