"""Images that a file names by their paths: the common part of sources that read lists, tables and JSON."""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from loaders.sources.duplicates import Duplicates, file_keys, refuse_repeated, refuse_shared, same_files
from loaders.sources.list_advice import advise
from loaders.sources.messages import printable, shortened, some
from loaders.sources.split import FileSplit

Class = TypeVar("Class", str, int)


@dataclass(frozen=True)
class Listing(Generic[Class]):
    """The images that a file lists for one split, in its order.

    path: of the file. paths: of the images, as written, relative to the root. classes: of the images, as written.
    lines: int64 (N,), the number of each image's line. unit: what a line of the file is called.
    """

    path: Path
    paths: list[str]
    classes: list[Class]
    lines: np.ndarray
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def where(self) -> str:
        """The file in messages."""
        return printable(self.path)

    def line(self, i: int) -> str:
        """What to call image i in a message."""
        return f"{self.unit} {self.lines[i]}: {printable(shortened(self.paths[i]))}"

    def subset(self, rows: np.ndarray) -> Listing[Class]:
        """The images at `rows`, int64 (K,)."""
        paths, classes = [self.paths[i] for i in rows], [self.classes[i] for i in rows]
        return Listing(self.path, paths, classes, self.lines[rows], self.unit)


def named_lists(source: str, what: str, **given: str | Path | None) -> dict[str, Path]:
    """The files that list the images of splits, by the name of the split; ValueError without one for train.

    given: the arguments `train_list`, `meta_list` and `test_list`. what: a file that `source` reads, in words.
    """
    if given["train_list"] is None:
        raise ValueError(f"{source} needs --train-list: {what}")
    return {
        name.removesuffix("_list"): Path(os.path.expanduser(path)) for name, path in given.items() if path is not None
    }


def read_bytes(path: Path, what: str) -> bytes:
    """The content of a file that the user names; ValueError, with `what` it should be, for one that is none."""
    if not path.is_file():
        how = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"list {printable(path)} {how}: give {what}")
    return path.read_bytes()


def text_of(data: bytes, path: Path, what: str) -> str:
    """The text of a file, whose names of files keep their bytes; ValueError for UTF-16, and for no text."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"list {printable(path)} is UTF-16 text: save it as UTF-8")
    if b"\0" in data:
        raise ValueError(f"list {printable(path)} is no text: give {what}")
    return os.fsdecode(data.removeprefix(codecs.BOM_UTF8))


def listed_files(
    root: Path, lists: Mapping[str, Listing], labels: Mapping[str, np.ndarray], *, allow_duplicates: bool
) -> tuple[dict[str, FileSplit], Duplicates]:
    """The listed images of each split, and which of them are one file.

    labels: int64 (N,) of each split. allow_duplicates: whether one file may be listed twice, in one list or in two.
    ValueError for files that are missing, with advice, and for those that are listed twice.
    """
    keys = _check_files(root, lists)
    pools = {name: FileSplit(root, part.paths, labels[name], part.where) for name, part in lists.items()}
    same = same_files(pools, keys)
    if not allow_duplicates:
        _refuse_duplicates(lists, same)
    return pools, same


def _check_files(root: Path, lists: Mapping[str, Listing]) -> dict[str, np.ndarray]:
    """`file_keys` of each list; every listed file must exist."""
    keys = {name: file_keys(root, part.paths) for name, part in lists.items()}
    absent = {name: np.flatnonzero(of_list == 0) for name, of_list in keys.items()}
    for name, rows in absent.items():
        if len(rows):
            part = lists[name]
            missing = [other.paths[i] for other_name, other in lists.items() for i in absent[other_name]]
            present = [other.paths[i] for other_name, other in lists.items() for i in np.flatnonzero(keys[other_name])]
            raise ValueError(
                f"{len(rows):,} of {len(part.paths):,} files of {part.where} do not exist under "
                f"{printable(root.absolute())}: {some([part.line(i) for i in rows[:10]])}"
                f"{advise(root, missing, present)}"
            )
    return keys


def _refuse_duplicates(lists: Mapping[str, Listing], same: Duplicates) -> None:
    """No image may be tested on that was trained or validated on, nor be listed twice."""

    def describe(split: str, i: int) -> str:
        return lists[split].line(i)

    refuse_shared(same, {name: part.where for name, part in lists.items()}, describe)
    for name, part in lists.items():
        for groups, how in ((same.two_labels, "under two labels"), (same.one_label, "more than once")):
            of_list = [group for group in groups if group[0][0] == name]
            refuse_repeated(of_list, f"of {part.where} are listed {how}", describe)
