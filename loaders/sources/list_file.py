"""List files, `relative/path label` a line: how ImageNet-LT, Places-LT and iNaturalist 2018 are published."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from loaders.order.longtail import holdout_per_class, longtail_subset, subsample
from loaders.sources.split import FileSplit, Source

MAX_LABEL = 1_000_000  # what is more is no class number, and would take memory for as many classes
SHOWN = 5  # how many offending lines or paths a message names


@dataclass(frozen=True)
class ListFile:
    """A parsed list: paths as written, labels int64 (N,)."""

    path: Path
    paths: list[str]
    labels: np.ndarray


def open_list_files(
    root: Path,
    *,
    train_list: str | Path | None,
    meta_list: str | Path | None,
    test_list: str | Path | None,
    imbalance_factor: float | None,
    meta_per_class: int,
    num_classes: int | None,
) -> Source:
    """Read the lists, and check every line and every file's existence before anything is decoded.

    The meta set is the first `meta_per_class` images of each class of the meta (validation) list; without one, the last
    `meta_per_class` of each class of the train list are held out. A higher imbalance takes the first images of each
    class of the train list.
    Raises ValueError for malformed, duplicate or overlapping lines, for classes without images, for missing files.
    """
    given = {"train": train_list, "meta": meta_list, "test": test_list}
    absent = [f"--{name}-list" for name in ("train", "test") if given[name] is None]
    if absent:
        raise ValueError(f"list_file needs {' and '.join(absent)}: a file of `relative/path label` lines")
    lists = {name: read_list(Path(path).expanduser()) for name, path in given.items() if path is not None}
    num_classes = _check_labels(lists, num_classes)
    _check_overlap(lists)
    _check_files(root, lists)

    splits = {name: FileSplit(root, part.paths, part.labels, f"all of {part.path}") for name, part in lists.items()}
    train = splits["train"]
    if "meta" in lists:
        listed = splits["meta"]
        counts = np.minimum(np.bincount(listed.labels, minlength=num_classes), meta_per_class)
        meta, how = listed.subset(longtail_subset(listed.labels, counts)), f"first {meta_per_class} of each class"
    else:
        held, rest = holdout_per_class(train.labels, meta_per_class, num_classes)
        meta, train, how = train.subset(held), train.subset(rest), f"last {meta_per_class} of each class, held out"
    train = train.subset(subsample(train.labels, imbalance_factor, num_classes))
    tail = "all" if "meta" in lists else "all that is not held out"
    if imbalance_factor is not None:
        tail = f"first n_c of each class of {tail}, imbalance factor {imbalance_factor:g},"
    where = lists.get("meta", lists["train"]).path
    splits = {
        "train": FileSplit(root, train.paths, train.labels, f"{tail} of {lists['train'].path}"),
        "meta": FileSplit(root, meta.paths, meta.labels, f"{how}, of {where}"),
        "test": splits["test"],
    }
    return Source("list_file", class_names(lists["train"], num_classes), splits)


def read_list(path: Path) -> ListFile:
    """Parse a list; the label is the last word of a line, so that paths may contain spaces. Empty lines are skipped.

    Raises ValueError with line numbers for lines that are not `path label`, and for a path that comes twice.
    """
    if not path.is_file():
        what = "is a folder, not a list" if path.is_dir() else "does not exist"
        raise ValueError(f"list {path} {what}: give a file of `relative/path label` lines")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"list {path} is not UTF-8 text ({error}): save it as UTF-8") from None
    paths, labels, malformed = [], [], []
    first_line: dict[str, int] = {}
    duplicates = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        words = line.strip().rsplit(maxsplit=1)
        if len(words) != 2 or not words[1].isdecimal() or int(words[1]) > MAX_LABEL:
            malformed.append(f"line {number}: {line.strip()[:80]!r}")
            continue
        if words[0] in first_line:
            duplicates.append(f"lines {first_line[words[0]]} and {number}: {words[0]}")
        first_line.setdefault(words[0], number)
        paths.append(words[0])
        labels.append(int(words[1]))
    if malformed:
        raise ValueError(
            f"{path}: {len(malformed)} lines are not `relative/path label` (labels: 0, 1, 2, …): {_some(malformed)}"
        )
    if duplicates:
        raise ValueError(f"{path}: {len(duplicates)} images are listed more than once: {_some(duplicates)}")
    if not paths:
        raise ValueError(f"{path} lists no images")
    return ListFile(path, paths, np.array(labels, dtype=np.int64))


def class_names(train: ListFile, num_classes: int) -> tuple[str, ...]:
    """The images' folders when each class has one of its own, as in ImageNet-LT and Places-LT, else the numbers.

    The part that all folders begin with is left out: `train/airfield/1.jpg` is class "airfield".
    """
    folders: list[set[str]] = [set() for _ in range(num_classes)]
    for path, label in zip(train.paths, train.labels, strict=True):
        folders[label].add(path.rpartition("/")[0])
    names = [next(iter(of_class)) for of_class in folders if len(of_class) == 1]
    if len(names) < num_classes or len(set(names)) < num_classes or num_classes < 2:
        return tuple(str(label) for label in range(num_classes))
    common = os.path.commonpath(names)
    return tuple(str(PurePosixPath(name).relative_to(common)) for name in names)


def _check_labels(lists: dict[str, ListFile], num_classes: int | None) -> int:
    """The number of classes: `num_classes`, or one more than the largest label; each needs an image in each list."""
    largest = {name: int(part.labels.max()) for name, part in lists.items()}
    if num_classes is None:
        num_classes = max(largest.values()) + 1
    for name, part in lists.items():
        if largest[name] >= num_classes:
            raise ValueError(
                f"{part.path} has label {largest[name]}, but num_classes is {num_classes}, so labels are 0 to "
                f"{num_classes - 1}: correct the one or the other"
            )
        empty = np.flatnonzero(np.bincount(part.labels, minlength=num_classes) == 0)
        if len(empty):
            raise ValueError(
                f"{part.path} has no image of {len(empty)} of {num_classes} classes (labels are numbered from 0 "
                f"without gaps): {_some([str(label) for label in empty])}"
            )
    return num_classes


def _check_overlap(lists: dict[str, ListFile]) -> None:
    """No image may be tested on that was trained or validated on, nor validated on that was trained on."""
    for a, b in (("train", "test"), ("meta", "test"), ("train", "meta")):
        if a in lists and b in lists:
            both = sorted(set(lists[a].paths) & set(lists[b].paths))
            if both:
                raise ValueError(
                    f"{len(both)} images are in both {lists[a].path} and {lists[b].path}, so accuracies would be too "
                    f"high: {_some(both)}"
                )


def _check_files(root: Path, lists: dict[str, ListFile]) -> None:
    """Every listed file must exist; each folder is listed once, because a look-up for each image is slow over NFS."""
    contents: dict[str, frozenset[str]] = {}
    for part in lists.values():
        missing = []
        for path in part.paths:
            folder, name = os.path.split(path)
            if folder not in contents:
                contents[folder] = _names_in(root / folder)
            if name not in contents[folder]:
                missing.append(path)
        if missing:
            raise ValueError(
                f"{len(missing):,} of {len(part.paths):,} files of {part.path} do not exist under {root.absolute()}: "
                f"{_some(missing)}{_suggestion(root, missing)}"
            )


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    except OSError:
        return frozenset()


def _suggestion(root: Path, missing: list[str]) -> str:
    """Advice when the missing files do exist under another root, or without (the first parts of) their prefix."""
    sample = missing[:SHOWN]
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir())[:200] if root.is_dir() else []
    for base in (root, *folders, root.absolute().parent):
        for dropped in range(4):
            stripped = [PurePosixPath(*PurePosixPath(path).parts[dropped:]) for path in sample]
            if all(str(path) != "." and (base / path).is_file() for path in stripped):
                prefix = "/".join(PurePosixPath(sample[0]).parts[:dropped])
                if not prefix:
                    return f". They are under {base}: give that as root"
                rename = f"remove '{prefix}/' from the lines of the list"
                return f". Without '{prefix}/' they are under {base}: {rename}" + (
                    "" if base == root else f" and give {base} as root"
                )
    return ". Is root the folder that the paths of the list start from?"


def _some(items: list[str]) -> str:
    return "; ".join(items[:SHOWN]) + ("; …" if len(items) > SHOWN else "")
