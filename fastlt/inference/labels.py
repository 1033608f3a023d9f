"""The classes of images that are known: by the folders that the images are in, or as a list."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.inference.inputs import images_below
from fastlt.names import nearest
from fastlt.paths import expand
from loaders.sources.classes import named_classes
from loaders.sources.messages import printable, some

CLASS_FOLDERS = "; give the folder whose folders are the classes"


def labelled_below(
    folder: Any, classes: Sequence[str], class_names: str | os.PathLike[str] | None = None
) -> tuple[list[Path], np.ndarray]:
    """The images of a folder with one folder a class, and their labels, int64 (N,).

    class_names: a file with the names of the folders' classes, as `named_classes` reads it.
    ValueError for anything else, for a folder without images, and for images in a folder that is none of `classes`.
    """
    root = Path(expand(os.fspath(folder))) if isinstance(folder, str | os.PathLike) else None
    if root is None or not root.is_dir():
        what = f"a {type(folder).__name__}" if root is None else printable(root)
        raise ValueError(f"{what} is no folder of class folders: give one, or the labels of the images")
    paths = images_below(root)
    inside = [path.relative_to(root).parts for path in paths]
    loose = [path for path, parts in zip(paths, inside, strict=True) if len(parts) == 1]
    if loose:
        raise ValueError(
            f"{printable(root)} has {len(loose):,} images in no class folder ({some([p.name for p in loose], ', ')}): "
            f"expected {printable(root)}/CLASS/IMAGE"
        )
    folders = sorted({printable(parts[0]) for parts in inside})
    names = folders if class_names is None else named_classes(Path(expand(os.fspath(class_names))), folders)
    called = dict(zip(folders, names, strict=True))
    return paths, _numbers(
        [called[printable(parts[0])] for parts in inside], classes, f"{printable(root)} has folders", CLASS_FOLDERS
    )


def class_labels(labels: Sequence[str] | Sequence[int], classes: Sequence[str], count: int) -> np.ndarray:
    """The labels of `count` images, given as names or numbers: int64 (count,). ValueError for others."""
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels were given for {count} images: give one for each")
    if all(isinstance(label, str) for label in labels):
        return _numbers([str(label) for label in labels], classes, "labels has names", "")
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError("labels: give the name or the number of each image's class")
    wrong = numbers[(numbers < 0) | (numbers >= len(classes))]
    if len(wrong):
        raise ValueError(f"labels has {wrong[0]}, and the network has classes 0 to {len(classes) - 1}")
    return numbers.astype(np.int64)


def _numbers(names: Sequence[str], classes: Sequence[str], what: str, advice: str) -> np.ndarray:
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(names) - label_of.keys())
    if unknown:
        near = nearest(unknown[0], classes) if len(unknown) == 1 else None
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(
            f"{what} that are no classes of the network: {some(unknown, ', ')}. Its {len(classes):,} classes are "
            f"{some(classes, ', ')}{hint}{advice}"
        )
    return np.array([label_of[name] for name in names], dtype=np.int64)
