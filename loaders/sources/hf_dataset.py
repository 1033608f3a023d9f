"""A folder that Hugging Face `datasets` wrote with `save_to_disk`: a column of images and one of labels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loaders.sources.classes import number_classes
from loaders.sources.columns import LABEL_COLUMNS, as_classes, called, choose_column
from loaders.sources.cut import Cut
from loaders.sources.decode import read_image_file
from loaders.sources.messages import printable, some
from loaders.sources.source import Source
from loaders.sources.split import SPLIT_WORDS, EncodedImages

if TYPE_CHECKING:
    from datasets import Dataset

UNLABELLED = -1  # of a ClassLabel


@dataclass(frozen=True)
class HfSplit(EncodedImages):
    """Images in the rows of a data set on disk.

    root: its folder. split: its name there. table: whose `column` gives the bytes or the path of an image's file.
    rows: int64 (N,).
    """

    root: Path
    split: str
    table: Dataset
    column: str
    rows: np.ndarray
    labels: np.ndarray
    provenance: str

    def contents(self, i: int) -> bytes:
        try:
            image = self.table[int(self.rows[i])][self.column]
        except OSError as error:
            raise ValueError(f"cannot be read: {error}") from None
        if image is None:
            raise ValueError("the row has no image")
        data = image["bytes"] if image["bytes"] is not None else read_image_file(Path(image["path"] or ""))
        if not data:
            raise ValueError("the file is empty (0 bytes)")
        return data

    def name(self, i: int) -> str:
        return str(self.root / self.listed(i))

    def listed(self, i: int) -> str:
        return f"{self.split}[{self.rows[i]}]"

    def subset(self, indices: np.ndarray, provenance: str | None = None) -> HfSplit:
        where = self.provenance if provenance is None else provenance
        return replace(self, rows=self.rows[indices], labels=self.labels[indices], provenance=where)


def open_hf_dataset(root: Path, *, image_column: str | None, label_column: str | None, cut: Cut | None) -> Source:
    """Read one data set, or a dictionary of data sets by split.

    Classes are those of the ClassLabel column that have training images, in its order; of a column without such names,
    whole numbers sorted by value or names. Columns are found by their type unless they are given. A split without
    images comes from the others by the rules of `Cut`.
    Raises ValueError for a folder of another kind, for columns that cannot be found, and as `Cut`.
    """
    tables, notes = _splits(root)
    if cut is not None and "train" not in tables:
        raise ValueError(
            f"{printable(root)} has no split train, only {some([name for name, _ in tables.values()], ', ')}"
        )
    pools, values, names_of = {}, {}, []
    for split, (name, table) in tables.items():
        part = _Part.of(root, name, table, image_column, label_column)
        if part is None:
            notes.append(f"{printable(root)}: split {name} has no labels and is not read")
            continue
        pools[split], values[split] = part.images, part.labels
        names_of.append(part.class_names)
    if not pools or (cut is not None and "train" not in pools):
        found = "train" if cut is not None else some(list(tables), ", ")
        raise ValueError(f"{printable(root)}: split {found} has no labels: there is nothing to go by")
    if any(names != names_of[0] for names in names_of):
        raise ValueError(f"{printable(root)}: the splits have other class names: give them one ClassLabel")
    names = names_of[0]
    where = {split: pool.provenance for split, pool in pools.items()}
    labels, class_names = number_classes(as_classes(values), where, names.__getitem__ if names else str, cut=cut)
    if names and len(class_names) < len(names):
        notes.append(f"{where['train']}: {len(names) - len(class_names):,} of {len(names):,} classes have no image")
    pools = {split: replace(pool, labels=labels[split]) for split, pool in pools.items()}
    return Source.of_pools("hf_dataset", pools, class_names, cut, tuple(notes))


def _splits(root: Path) -> tuple[dict[str, tuple[str, Dataset]], list[str]]:
    """The name and data set of each split, and notes on what is not read."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{printable(root)} needs Hugging Face datasets: pip install 'fastlt[hf]'") from None
    try:
        found = datasets.load_from_disk(str(root))
    except Exception as error:  # of many types: what is wrong stands in the message
        raise ValueError(
            f"{printable(root)} cannot be opened as a folder of datasets' save_to_disk: {str(error).splitlines()[0]}"
        ) from None
    if isinstance(found, datasets.Dataset):
        return {"train": ("train", found)}, []
    splits: dict[str, tuple[str, Dataset]] = {}
    unread = []
    for name, table in found.items():
        split = SPLIT_WORDS.get(str(name).lower())
        if split is None:
            unread.append(str(name))
        elif split in splits:
            raise ValueError(f"{printable(root)}: {splits[split][0]} and {name} are both its {split} split: keep one")
        else:
            splits[split] = str(name), table
    if not splits:
        raise ValueError(f"{printable(root)} has no split train, only {some(list(map(str, found)), ', ')}")
    return splits, [f"{printable(root)}: not read are the splits {some(unread, ', ')}"] if unread else []


@dataclass(frozen=True)
class _Part:
    """The images of a split, without labels yet; what they are labelled with, and the names of a ClassLabel."""

    images: HfSplit
    labels: list[Any]
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, root: Path, name: str, table: Dataset, image: str | None, label: str | None) -> _Part | None:
        """None where no row has a label."""
        import datasets

        where, columns = f"{printable(root)}, split {name}", table.column_names
        pictures = [c for c in columns if isinstance(table.features[c], datasets.Image)]
        image = choose_column(columns, image, pictures, "image", where)
        if image not in pictures:
            raise ValueError(f"{where}: column {image!r} holds no images, but {table.features[image]}")
        classes = [c for c in columns if isinstance(table.features[c], datasets.ClassLabel)]
        label = choose_column(columns, label, classes or called(columns, LABEL_COLUMNS), "label", where)
        labels = _labels(table, label, where)
        if labels is None:
            return None
        names = tuple(table.features[label].names) if label in classes else ()
        files = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        unlabelled = np.zeros(len(labels), dtype=np.int64)
        return cls(HfSplit(root, name, files, image, np.arange(len(labels)), unlabelled, where), labels, names)


def _labels(table: Dataset, column: str, where: str) -> list[Any] | None:
    """The label of each row; None where no row has one. ValueError where some have, or for what is no label."""
    labels = table.select_columns([column])[:][column]
    absent = [i for i, label in enumerate(labels) if label is None or label == UNLABELLED]
    if len(absent) == len(labels):
        return None
    if absent:
        raise ValueError(f"{where}: {len(absent):,} rows have no label: {some([str(i) for i in absent[:10]], ', ')}")
    if not all(isinstance(label, (int, str)) for label in labels):
        raise ValueError(f"{where}: column {column!r} holds neither class numbers nor names: give --label-column")
    return labels
