"""Where images come from: one file a source, each opened by `open_source`."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastlt.names import pick
from loaders.order.longtail import CONVENTIONS
from loaders.sources.cifar import CIFAR10, CIFAR100, open_cifar
from loaders.sources.digits import open_digits
from loaders.sources.image_folder import open_image_folder
from loaders.sources.list_file import open_list_files
from loaders.sources.messages import printable
from loaders.sources.split import ArraySplit, FileSplit, Source, Split

__all__ = ["SOURCES", "ArraySplit", "FileSplit", "Source", "SourceKind", "Split", "open_source", "sources_taking"]


@dataclass(frozen=True)
class SourceKind:
    """One kind of data set, and how it is opened.

    open: gives the Source; its parameters are those of `open_source` that it takes, with "root" a folder that exists,
        unless it takes "download", too, and may make it.
    small: whether a run converts it by itself; the others are converted by a command before.
    """

    name: str
    open: Callable[..., Source]
    small: bool = False

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the arguments that mean something to it."""
        return tuple(inspect.signature(self.open).parameters)


SOURCES: dict[str, SourceKind] = {
    kind.name: kind
    for kind in (
        SourceKind("digits", open_digits, small=True),
        SourceKind("cifar10", functools.partial(open_cifar, CIFAR10), small=True),
        SourceKind("cifar100", functools.partial(open_cifar, CIFAR100), small=True),
        SourceKind("image_folder", open_image_folder),
        SourceKind("list_file", open_list_files),
    )
}


def sources_taking(argument: str) -> list[str]:
    """The names of the sources that take this argument of `open_source`."""
    return [name for name, kind in SOURCES.items() if argument in kind.takes]


def open_source(
    name: str,
    *,
    root: str | Path | None = None,
    train_list: str | Path | None = None,
    meta_list: str | Path | None = None,
    test_list: str | Path | None = None,
    download: bool = True,
    num_classes: int | None = None,
    imbalance_factor: float | None = None,
    convention: str = "paper",
    meta_per_class: int = 10,
    seed: int = 0,
    allow_duplicates: bool = False,
) -> Source:
    """Find a data set and cut it into the splits "train", "meta" and "test"; nothing is decoded yet.

    root: the folder with the data; `digits` needs none.
    train_list, meta_list, test_list: for `list_file`; without a meta list, images are held out of train.
    download: whether CIFAR may be fetched when it is not under `root`.
    num_classes: what the data set must have, or None to take what it has.
    imbalance_factor: largest over smallest class of the long tail to cut, None for the data set as it is.
    convention: "paper" or "ldam", how CIFAR is cut (`loaders.order.longtail`).
    seed: which digits are held out; the other sources are cut by file order.
    allow_duplicates: whether one file may be in two splits or under two labels, for sources of files.
    Raises ValueError, saying what to do, when the data are missing or not what they should be.
    """
    kind = pick("source", name, SOURCES)
    pick("convention", convention, CONVENTIONS)
    if imbalance_factor is not None and not 1 <= imbalance_factor < math.inf:
        raise ValueError(f"imbalance_factor is {imbalance_factor}: it must be a number from 1 (balanced) on")
    if meta_per_class < 1:
        raise ValueError(f"meta_per_class is {meta_per_class}: it must be at least 1")
    arguments = {
        "train_list": train_list,
        "meta_list": meta_list,
        "test_list": test_list,
        "download": download,
        "num_classes": num_classes,
        "imbalance_factor": imbalance_factor,
        "convention": convention,
        "meta_per_class": meta_per_class,
        "seed": seed,
        "allow_duplicates": allow_duplicates,
    }
    if "root" in kind.takes:
        arguments["root"] = _root(kind, root, may_be_made=download and "download" in kind.takes)
    source = kind.open(**{argument: arguments[argument] for argument in kind.takes})
    if num_classes is not None and num_classes != source.num_classes:
        raise ValueError(f"{name} has {source.num_classes} classes, num_classes says {num_classes}: correct it")
    return source


def _root(kind: SourceKind, root: str | Path | None, *, may_be_made: bool) -> Path:
    """The folder as a Path; a missing one is an error, unless a download makes it."""
    if root is None:
        raise ValueError(f"{kind.name} needs a root: the folder that holds its images")
    root = Path(os.path.expanduser(root))
    if not root.exists() and not may_be_made:
        raise ValueError(
            f"root {printable(root.absolute())} does not exist: {kind.name} needs the folder that holds its images"
        )
    return root
