"""List files, `relative/path label` a line: how ImageNet-LT, Places-LT and iNaturalist 2018 are published."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import numpy as np

from loaders.sources.cut import Cut
from loaders.sources.duplicates import Duplicates
from loaders.sources.list_advice import advise_lines
from loaders.sources.listing import Listing, listed_files, named_lists, read_bytes, text_of
from loaders.sources.messages import printable, shortened, some
from loaders.sources.source import Source

MAX_LABEL = 1_000_000  # what is more is no class number, and would take memory for as many classes
WANTED = "a file of `relative/path label` lines"


def open_list_files(
    root: Path,
    *,
    train_list: str | Path | None,
    meta_list: str | Path | None,
    test_list: str | Path | None,
    cut: Cut | None,
    num_classes: int | None,
    allow_duplicates: bool = False,
) -> Source:
    """Read the lists, and check every line and every file's existence before anything is decoded.

    A split without a list comes from the others by the rules of `Cut`.
    allow_duplicates: whether one file may be listed twice, in one list or in two.
    Raises ValueError for malformed, duplicate or overlapping lines, for classes without training images, for missing
    files.
    """
    given = named_lists("list_file", WANTED, train_list=train_list, meta_list=meta_list, test_list=test_list)
    lists = {name: read_list(path, root) for name, path in given.items()}
    labels = {name: np.array(part.classes, dtype=np.int64) for name, part in lists.items()}
    if cut is None:  # the labels are numbers of another data set's classes, which need not all be here
        pools, _ = listed_files(root, lists, labels, allow_duplicates=allow_duplicates)
        largest = max(int(of_list.max()) for of_list in labels.values())
        return Source.of_pools("list_file", pools, tuple(str(label) for label in range(largest + 1)), None)
    num_classes = _check_labels(lists, labels, num_classes)
    pools, same = listed_files(root, lists, labels, allow_duplicates=allow_duplicates)
    names = class_names(lists["train"], num_classes, root, same)
    return Source.of_pools("list_file", pools, names, cut)


def read_list(path: Path, root: Path | None = None) -> Listing[int]:
    """Parse a list; the label is the last word of a line, so that paths may contain spaces. Empty lines are skipped.

    A path has the bytes that the list has, whatever their encoding, as the names of files have.
    root: where the files should be, for advice on lines that cannot be read.
    Raises ValueError with line numbers for lines that are not `path label`.
    """
    lines = re.split("\r\n|\n|\r", text_of(read_bytes(path, WANTED), path, WANTED))
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
        raise ValueError(f"{printable(path)} lists no images: give {WANTED}")
    return Listing(path, paths, labels, np.array(numbers, dtype=np.int64))


def _is_label(word: str) -> bool:
    return word.isdecimal() and len(word) <= len(str(MAX_LABEL)) and int(word) <= MAX_LABEL


def class_names(train: Listing[int], num_classes: int, root: Path, same: Duplicates) -> tuple[str, ...]:
    """The images' folders when each class has one of its own, as in ImageNet-LT and Places-LT, else the numbers.

    The part that all folders begin with is left out: `train/airfield/1.jpg` is class "airfield". Other spellings of a
    folder are the same folder, and lines of files that are listed twice say nothing of their class.
    """
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    twice = {i for _, group in same for split, i in group if split == "train"}
    spelled: dict[str, str] = {}
    for i, (path, label) in enumerate(zip(train.paths, train.classes, strict=True)):
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


def _check_labels(lists: dict[str, Listing[int]], labels: dict[str, np.ndarray], num_classes: int | None) -> int:
    """The number of classes: `num_classes`, or one more than the largest label; each needs a training image."""
    largest = {name: int(of_list.max()) for name, of_list in labels.items()}
    from_one = all(of_list.min() > 0 for of_list in labels.values())
    hint = ". No list has label 0: subtract 1 from each label" if from_one and _complete_from_one(labels) else ""
    if num_classes is None:
        num_classes = max(largest.values()) + 1
    for name, part in lists.items():
        if largest[name] >= num_classes:
            raise ValueError(
                f"{part.where} has label {largest[name]}, but num_classes is {num_classes}, so labels are 0 to "
                f"{num_classes - 1}: correct the one or the other{hint}"
            )
    empty = np.flatnonzero(np.bincount(labels["train"], minlength=num_classes) == 0)
    if len(empty):
        raise ValueError(
            f"{lists['train'].where} has no image of {len(empty):,} of {num_classes:,} classes (labels are numbered "
            f"from 0 without gaps): {some([str(label) for label in empty[:10]])}{hint}"
        )
    return num_classes


def _complete_from_one(labels: dict[str, np.ndarray]) -> bool:
    """Whether the train list has each label from 1 to the largest of all lists."""
    largest = max(int(of_list.max()) for of_list in labels.values())
    return bool(np.bincount(labels["train"], minlength=largest + 1)[1:].all())
