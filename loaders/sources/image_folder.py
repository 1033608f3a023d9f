"""ROOT/{train,val,test}/class/image: the layout of torchvision's ImageFolder, one folder a split."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import numpy as np

from loaders.order.longtail import holdout_per_class, longtail_subset, subsample
from loaders.sources.decode import EXTENSIONS, looks_like_image
from loaders.sources.split import FileSplit, Source

META_FOLDERS = ("meta", "val")


def open_image_folder(
    root: Path, *, imbalance_factor: float | None, meta_per_class: int, num_classes: int | None
) -> Source:
    """Read the folders of `root`; class names are the folders of train, sorted.

    With train, test and meta or val, the meta set is the first `meta_per_class` images of each class of the latter.
    With train and only one of test or val, that one is the test set, and the last `meta_per_class` images of each class
    of train (sorted by name) are held out as the meta set.
    Other files (notes, thumbnails' databases) may lie among the images. An image is known by its first bytes where its
    extension does not say so, and a link `a.jpg` that leads nowhere is an image that cannot be read.
    Raises ValueError when a folder, or a class in one of them, is missing.
    """
    train_folder = root / "train"
    if not train_folder.is_dir():
        raise ValueError(f"{root} has no folder 'train': expected {root}/train/CLASS/IMAGE, and the same for test")
    meta_folder = next((root / name for name in META_FOLDERS if (root / name).is_dir()), None)
    test_folder = root / "test"
    if not test_folder.is_dir():
        test_folder, meta_folder = meta_folder, None
    if test_folder is None:
        raise ValueError(f"{root} has neither 'test' nor 'val' beside 'train': there is nothing to evaluate on")

    class_names = _class_names(train_folder)
    if num_classes is not None and num_classes != len(class_names):
        raise ValueError(f"{train_folder} holds {len(class_names)} classes, num_classes says {num_classes}")
    train = _read_folder(root, train_folder, class_names)
    test = _read_folder(root, test_folder, class_names)
    if meta_folder is None:
        held, rest = holdout_per_class(train.labels, meta_per_class, len(class_names))
        meta, train = train.subset(held), train.subset(rest)
        how = f"last {meta_per_class} of each class of {train_folder}, held out"
    else:
        meta = _read_folder(root, meta_folder, class_names)
        counts = np.minimum(np.bincount(meta.labels, minlength=len(class_names)), meta_per_class)
        meta = meta.subset(longtail_subset(meta.labels, counts))
        how = f"first {meta_per_class} of each class of {meta_folder}"
    train = train.subset(subsample(train.labels, imbalance_factor, len(class_names)))
    tail = "all" if meta_folder else "all that is not held out"
    if imbalance_factor is not None:
        tail = f"first n_c of each class of {tail}, imbalance factor {imbalance_factor:g},"
    splits = {
        "train": FileSplit(root, train.paths, train.labels, f"{tail} of {train_folder}"),
        "meta": FileSplit(root, meta.paths, meta.labels, how),
        "test": FileSplit(root, test.paths, test.labels, f"all of {test_folder}"),
    }
    return Source("image_folder", class_names, splits)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} holds no class folders: expected {folder}/CLASS/IMAGE")
    return tuple(names)


def _read_folder(root: Path, folder: Path, class_names: tuple[str, ...]) -> FileSplit:
    """Every image below the class folders, sorted by path within the class."""
    present = set(_class_names(folder))
    unknown = sorted(present - set(class_names))
    if unknown:
        raise ValueError(f"{folder} holds {len(unknown)} classes that train has not: {_some(unknown)}")
    paths, labels, empty = [], [], []
    for label, name in enumerate(class_names):
        found = _images(folder / name) if name in present else []
        if not found:
            empty.append(name)
        paths += [str(path.relative_to(root)) for path in found]
        labels += [label] * len(found)
    if empty:
        raise ValueError(f"{folder} has no images of {len(empty)} of {len(class_names)} classes: {_some(empty)}")
    return FileSplit(root, paths, np.array(labels, dtype=np.int64), str(folder))


def _images(folder: Path) -> list[Path]:
    """The files below `folder` that are called images, readable or not, and those that are images by another name."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):  # as torchvision's ImageFolder
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        found += [Path(here, name) for name in names]
    return sorted(path for path in found if _is_image(path))


def _unreadable(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename} cannot be read ({error.strerror}): its images would be left out")


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS or (not path.name.startswith(".") and looks_like_image(path))


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", …" if len(names) > limit else "")
