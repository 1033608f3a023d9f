"""Where images come from, seen from above: a numbered sequence of labelled images, in memory or in files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from loaders.order.longtail import holdout_per_class, longtail_subset, subsample
from loaders.sources.decode import decode_bytes, jpeg_bytes, read_image_file

SPLITS = ("train", "meta", "test")  # of every source
T = TypeVar("T")


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

    def subset(self, indices: np.ndarray) -> ArraySplit:
        return replace(self, labels=self.labels[indices], rows=self.rows[indices])


@dataclass(frozen=True)
class FileSplit:
    """Images in files, decoded when asked for.

    root: the folder that `paths` are relative to.
    labels: int64 (N,).
    """

    root: Path
    paths: Sequence[str]
    labels: np.ndarray
    provenance: str

    def __post_init__(self) -> None:
        assert self.labels.dtype == np.int64, self.labels.dtype
        assert len(self.labels) == len(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def contents(self, i: int) -> bytes:
        """The file of image i; ValueError with the reason when it cannot be read."""
        return read_image_file(self.root / self.paths[i])

    def image(self, i: int) -> np.ndarray:
        return decode_bytes(self.contents(i))

    def encoded(self, i: int) -> bytes | None:
        return jpeg_bytes(self.root / self.paths[i])

    def name(self, i: int) -> str:
        return str(self.root / self.paths[i])

    def subset(self, indices: np.ndarray) -> FileSplit:
        return replace(self, paths=[self.paths[i] for i in indices], labels=self.labels[indices])


class Choice(NamedTuple):
    """The images of a split: `rows`, int64 (K,), of the candidates `pool`."""

    pool: str
    rows: np.ndarray
    provenance: str


@dataclass(frozen=True)
class Candidates:
    """What the splits of a data set of files are chosen from.

    pools: "train" and "test", and "meta" where the data set has one; their provenance is the name of their place.
    meta_per_class: of "meta" the first so many images of each class are the meta set; without one, the last so many of
        each class of "train", which are held out.
    imbalance_factor: of the long tail to cut out of "train" by taking the first images of each class; None for all.
    """

    pools: Mapping[str, FileSplit]
    class_names: tuple[str, ...]
    meta_per_class: int
    imbalance_factor: float | None

    def choose(self, usable: Mapping[str, np.ndarray] | None = None) -> dict[str, Choice]:
        """The images of each split, among those that can be used.

        usable: rows of each pool, int64 (K,) in order; None for all.
        Raises ValueError when a class has too few.
        """
        rows = usable or {name: np.arange(len(pool)) for name, pool in self.pools.items()}
        labels = {name: pool.labels[rows[name]] for name, pool in self.pools.items()}
        where = {name: pool.provenance for name, pool in self.pools.items()}
        count, num_classes = self.meta_per_class, len(self.class_names)
        if "meta" in self.pools:
            of_class = np.minimum(np.bincount(labels["meta"], minlength=num_classes), count)
            first = longtail_subset(labels["meta"], of_class)
            meta = Choice("meta", rows["meta"][first], f"first {count} of each class of {where['meta']}")
            train, tail = rows["train"], "all"
        else:
            held, rest = self._of_train(lambda: holdout_per_class(labels["train"], count, num_classes))
            meta = Choice("train", rows["train"][held], f"last {count} of each class of {where['train']}, held out")
            train, tail = rows["train"][rest], "all that is not held out"
        left = self.pools["train"].labels[train]
        train = train[self._of_train(lambda: subsample(left, self.imbalance_factor, num_classes))]
        if self.imbalance_factor is not None:
            tail = f"first n_c of each class of {tail}, imbalance factor {self.imbalance_factor:g},"
        return {
            "train": Choice("train", train, f"{tail} of {where['train']}"),
            "meta": meta,
            "test": Choice("test", rows["test"], f"all of {where['test']}"),
        }

    def _of_train(self, choose: Callable[[], T]) -> T:
        """What `choose` gives; its ValueError with the name of the place in front."""
        try:
            return choose()
        except ValueError as error:
            raise ValueError(f"{self.pools['train'].provenance}: {error}") from None

    def splits(self, choices: Mapping[str, Choice]) -> dict[str, FileSplit]:
        """The images of the choices."""
        return {
            name: replace(self.pools[choice.pool].subset(choice.rows), provenance=choice.provenance)
            for name, choice in choices.items()
        }


@dataclass(frozen=True)
class Source:
    """A data set before conversion: class names in label order, and the images of each of SPLITS.

    candidates: what the splits were chosen from, where images may turn out to be damaged.
    notes: what the user should know, such as folders that were not read, one line each.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    candidates: Candidates | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of_files(cls, name: str, candidates: Candidates, notes: tuple[str, ...] = ()) -> Source:
        """The data set whose splits are chosen among all candidates."""
        splits = candidates.splits(candidates.choose())
        return cls(name, candidates.class_names, splits, candidates, notes)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def listing_sha256(self) -> str | None:
        """A checksum of which files are in which split and class, wherever their root lies; None for arrays.

        By it another folder, or a list that was edited, is told from the one that was converted.
        """
        digest = hashlib.sha256(repr(self.class_names).encode("utf-8", "surrogateescape"))
        for name, split in sorted(self.splits.items()):
            if not isinstance(split, FileSplit):
                return None
            digest.update(f"\0{name}\0".encode())
            for path, label in zip(split.paths, split.labels.tolist(), strict=True):
                digest.update(f"{path}\0{label}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()
