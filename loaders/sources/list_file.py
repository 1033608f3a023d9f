"""List files, `relative/path label` a line: how ImageNet-LT, Places-LT and iNaturalist 2018 are published."""

from __future__ import annotations

import codecs
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from loaders.sources.duplicates import Duplicates, file_keys, refuse_repeated, refuse_shared, same_files
from loaders.sources.list_advice import advise, advise_lines
from loaders.sources.messages import printable, shortened, some
from loaders.sources.split import Candidates, FileSplit, Source

MAX_LABEL = 1_000_000  # what is more is no class number, and would take memory for as many classes


@dataclass(frozen=True)
class ListFile:
    """A parsed list: paths as written, labels int64 (N,), and the numbers of their lines, int64 (N,), from 1."""

    path: Path
    paths: list[str]
    labels: np.ndarray
    lines: np.ndarray

    def line(self, i: int) -> str:
        """What to call line i in a message."""
        return f"line {self.lines[i]}: {printable(shortened(self.paths[i]))}"


def open_list_files(
    root: Path,
    *,
    train_list: str | Path | None,
    meta_list: str | Path | None,
    test_list: str | Path | None,
    imbalance_factor: float | None,
    meta_per_class: int,
    num_classes: int | None,
    allow_duplicates: bool = False,
) -> Source:
    """Read the lists, and check every line and every file's existence before anything is decoded.

    The meta set is the first `meta_per_class` images of each class of the meta (validation) list; without one, the last
    `meta_per_class` of each class of the train list are held out. A higher imbalance takes the first images of each
    class of the train list.
    allow_duplicates: whether one file may be listed twice, in one list or in two.
    Raises ValueError for malformed, duplicate or overlapping lines, for classes without images, for missing files.
    """
    given = {"train": train_list, "meta": meta_list, "test": test_list}
    absent = [f"--{name}-list" for name in ("train", "test") if given[name] is None]
    if absent:
        raise ValueError(f"list_file needs {' and '.join(absent)}: a file of `relative/path label` lines")
    lists = {name: read_list(Path(os.path.expanduser(path)), root) for name, path in given.items() if path is not None}
    num_classes = _check_labels(lists, num_classes)
    keys = _check_files(root, lists)
    pools = {name: FileSplit(root, part.paths, part.labels, printable(part.path)) for name, part in lists.items()}
    same = same_files(pools, keys)
    if not allow_duplicates:
        _refuse_duplicates(lists, same)
    names = class_names(lists["train"], num_classes, root, same)
    return Source.of_files("list_file", Candidates(pools, names, meta_per_class, imbalance_factor))


def read_list(path: Path, root: Path | None = None) -> ListFile:
    """Parse a list; the label is the last word of a line, so that paths may contain spaces. Empty lines are skipped.

    A path has the bytes that the list has, whatever their encoding, as the names of files have.
    root: where the files should be, for advice on lines that cannot be read.
    Raises ValueError with line numbers for lines that are not `path label`.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise ValueError(f"list {printable(path)} {what}: give a file of `relative/path label` lines")
    lines = re.split("\r\n|\n|\r", _text(path))
    paths, labels, numbers, malformed = [], [], [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        words = line.strip().rsplit(maxsplit=1)
        if len(words) != 2 or not _is_label(words[1]):
            malformed.append(f"line {number}: {shortened(line.strip())!r}")
            continue
        paths.append(words[0])
        labels.append(int(words[1]))
        numbers.append(number)
    if malformed:
        advice = advise_lines(root, [line for line in lines if line.strip()], _is_label) if root else ""
        raise ValueError(
            f"{printable(path)}: {len(malformed):,} lines are not `relative/path label` (labels: 0, 1, 2, …): "
            f"{some(malformed)}{advice}"
        )
    if not paths:
        raise ValueError(f"{printable(path)} lists no images: give a file of `relative/path label` lines")
    return ListFile(path, paths, np.array(labels, dtype=np.int64), np.array(numbers, dtype=np.int64))


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"list {printable(path)} is UTF-16 text: save it as UTF-8")
    if b"\0" in data:
        raise ValueError(f"list {printable(path)} is no text: give a file of `relative/path label` lines")
    return os.fsdecode(data.removeprefix(codecs.BOM_UTF8))


def _is_label(word: str) -> bool:
    return word.isdecimal() and len(word) <= len(str(MAX_LABEL)) and int(word) <= MAX_LABEL


def class_names(train: ListFile, num_classes: int, root: Path, same: Duplicates) -> tuple[str, ...]:
    """The images' folders when each class has one of its own, as in ImageNet-LT and Places-LT, else the numbers.

    The part that all folders begin with is left out: `train/airfield/1.jpg` is class "airfield". Other spellings of a
    folder are the same folder, and lines of files that are listed twice say nothing of their class.
    """
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    twice = {i for _, group in same for split, i in group if split == "train"}
    spelled: dict[str, str] = {}
    for i, (path, label) in enumerate(zip(train.paths, train.labels, strict=True)):
        if i not in twice:
            folder = path.rpartition("/")[0]
            if folder not in spelled:
                spelled[folder] = os.path.relpath(os.path.join(root, folder), root)
            folders[label].add(spelled[folder])
    names = [next(iter(of_class)) for of_class in folders if len(of_class) == 1]
    if len(names) < num_classes or len(set(names)) < num_classes or num_classes < 2:
        return tuple(str(label) for label in range(num_classes))
    common = os.path.commonpath(names)
    return tuple(printable(PurePosixPath(name).relative_to(common)) for name in names)


def _check_labels(lists: dict[str, ListFile], num_classes: int | None) -> int:
    """The number of classes: `num_classes`, or one more than the largest label; each needs an image in each list."""
    largest = {name: int(part.labels.max()) for name, part in lists.items()}
    from_one = all(part.labels.min() > 0 for part in lists.values())
    hint = ". No list has label 0: subtract 1 from each label" if from_one and _complete_from_one(lists) else ""
    if num_classes is None:
        num_classes = max(largest.values()) + 1
    for name, part in lists.items():
        where = printable(part.path)
        if largest[name] >= num_classes:
            raise ValueError(
                f"{where} has label {largest[name]}, but num_classes is {num_classes}, so labels are 0 to "
                f"{num_classes - 1}: correct the one or the other{hint}"
            )
        empty = np.flatnonzero(np.bincount(part.labels, minlength=num_classes) == 0)
        if len(empty):
            raise ValueError(
                f"{where} has no image of {len(empty):,} of {num_classes:,} classes (labels are numbered from 0 "
                f"without gaps): {some([str(label) for label in empty[:10]])}{hint}"
            )
    return num_classes


def _complete_from_one(lists: dict[str, ListFile]) -> bool:
    """Whether every list has each label from 1 to the largest."""
    largest = max(int(part.labels.max()) for part in lists.values())
    return all(np.bincount(part.labels, minlength=largest + 1)[1:].all() for part in lists.values())


def _check_files(root: Path, lists: dict[str, ListFile]) -> dict[str, np.ndarray]:
    """`file_keys` of each list; every listed file must exist."""
    keys = {name: file_keys(root, part.paths) for name, part in lists.items()}
    absent = {name: np.flatnonzero(of_list == 0) for name, of_list in keys.items()}
    for name, rows in absent.items():
        if len(rows):
            part = lists[name]
            missing = [other.paths[i] for other_name, other in lists.items() for i in absent[other_name]]
            present = [other.paths[i] for other_name, other in lists.items() for i in np.flatnonzero(keys[other_name])]
            raise ValueError(
                f"{len(rows):,} of {len(part.paths):,} files of {printable(part.path)} do not exist under "
                f"{printable(root.absolute())}: {some([part.line(i) for i in rows[:10]])}"
                f"{advise(root, missing, present)}"
            )
    return keys


def _refuse_duplicates(lists: dict[str, ListFile], same: Duplicates) -> None:
    """No image may be tested on that was trained or validated on, nor be listed twice."""

    def describe(split: str, i: int) -> str:
        return lists[split].line(i)

    refuse_shared(same, {name: printable(part.path) for name, part in lists.items()}, describe)
    for name, part in lists.items():
        for groups, how in ((same.two_labels, "under two labels"), (same.one_label, "more than once")):
            of_list = [group for group in groups if group[0][0] == name]
            refuse_repeated(of_list, f"of {printable(part.path)} are listed {how}", describe)
