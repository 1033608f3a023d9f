"""Where images come from: one file a source, each opened by `open_source`."""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fastlt.names import pick
from loaders.order.longtail import CONVENTIONS
from loaders.sources.cifar import CIFAR10, CIFAR100, CifarSpec, open_cifar, open_whole_cifar
from loaders.sources.classes import named_classes
from loaders.sources.coco import open_coco
from loaders.sources.cut import Cut, Shares
from loaders.sources.digits import open_digits, open_whole_digits
from loaders.sources.hf_dataset import open_hf_dataset
from loaders.sources.image_folder import open_image_folder
from loaders.sources.list_file import open_list_files
from loaders.sources.messages import printable
from loaders.sources.source import Source
from loaders.sources.split import ArraySplit, EncodedImages, FileSplit, Split
from loaders.sources.table import open_table
from loaders.sources.webdataset import open_webdataset

__all__ = [
    "SOURCES",
    "ArraySplit",
    "EncodedImages",
    "FileSplit",
    "Source",
    "SourceKind",
    "Split",
    "open_labelled",
    "open_source",
    "sources_taking",
]


@dataclass(frozen=True)
class SourceKind:
    """One kind of data set, and how it is opened.

    open: gives the Source; its parameters are those of `open_source` that it takes, with "root" a folder that exists,
        unless it takes "download", too, and may make it, and "cut" for those of `Cut`; None leaves all images in the
        splits that the data bring, which need not have train.
    whole: of a source that every run cuts for itself: gives all images, in the splits that were published.
    small: whether a run converts it by itself; the others are converted by a command before.
    numbered: whether its labels are the numbers of classes without any names.
    """

    name: str
    open: Callable[..., Source]
    whole: Callable[..., Source] | None = None
    small: bool = False
    numbered: bool = False

    @property
    def takes(self) -> tuple[str, ...]:
        """The names of the arguments that mean something to it."""
        own = inspect.signature(self.open).parameters
        # Files of equal contents are looked for in every data set of files, and all of these may name their classes.
        of_files = (*_OF_CUT, DUPLICATES, CLASS_NAMES)
        return tuple(dict.fromkeys(n for one in own for n in (of_files if one == "cut" else (one,))))

    @property
    def takes_cut(self) -> bool:
        """Whether its splits are chosen by `Cut`."""
        return "cut" in inspect.signature(self.open).parameters


DUPLICATES, CLASS_NAMES = "allow_duplicates", "class_names"
_OF_CUT = tuple(key.name for key in fields(Cut))


def _cifar(spec: CifarSpec) -> tuple[Callable[..., Source], Callable[..., Source]]:
    return functools.partial(open_cifar, spec), functools.partial(open_whole_cifar, spec)


SOURCES: dict[str, SourceKind] = {
    kind.name: kind
    for kind in (
        SourceKind("digits", open_digits, open_whole_digits, small=True),
        SourceKind("cifar10", *_cifar(CIFAR10), small=True),
        SourceKind("cifar100", *_cifar(CIFAR100), small=True),
        SourceKind("image_folder", open_image_folder),
        SourceKind("list_file", open_list_files, numbered=True),
        SourceKind("table", open_table),
        SourceKind("coco", open_coco),
        SourceKind("webdataset", open_webdataset),
        SourceKind("hf_dataset", open_hf_dataset),
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
    split: Shares | None = None,
    split_seed: int = 0,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    class_names: str | Path | None = None,
    allow_duplicates: bool = False,
) -> Source:
    """Find a data set and cut it into the splits "train", "meta" and "test"; nothing is decoded yet.

    root: the folder with the data; `digits` needs none.
    train_list, meta_list, test_list: files that list the images of a split.
    download: whether CIFAR may be fetched when it is not under `root`.
    num_classes: what the data set must have, or None to take what it has.
    convention: "paper" or "ldam", how CIFAR is cut (`loaders.order.longtail`).
    meta_per_class, imbalance_factor, split, split_seed: see `Cut`. Digits are drawn by split_seed, too.
    image_column, label_column, split_column: of a table, when they have other names than usual.
    class_names: a file with other names for the classes, see `named_classes`; for sources that take `Cut`.
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
        "split": split,
        "split_seed": split_seed,
        "image_column": image_column,
        "label_column": label_column,
        "split_column": split_column,
        "allow_duplicates": allow_duplicates,
    }
    if "root" in kind.takes:
        arguments["root"] = _root(kind, root, may_be_made=download and "download" in kind.takes)
    if kind.takes_cut:
        arguments["cut"] = Cut(**{name: arguments[name] for name in _OF_CUT})
    source = kind.open(**{name: arguments[name] for name in inspect.signature(kind.open).parameters})
    if class_names is not None and CLASS_NAMES in kind.takes:
        source = replace(source, class_names=named_classes(Path(os.path.expanduser(class_names)), source.class_names))
    if num_classes is not None and num_classes != source.num_classes:
        raise ValueError(f"{name} has {source.num_classes} classes, num_classes says {num_classes}: correct it")
    return source


def open_labelled(
    name: str,
    *,
    root: Path | None = None,
    listing: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    class_names: Path | None = None,
) -> Source:
    """All images of a data set with their classes, in the splits that the data bring; "train" where they bring none.

    Nothing is held out, and no class or split need be there: for images that are measured on, not trained.
    listing: the file that lists the images, of a source that reads lists. The others: as of `open_source`.
    Raises ValueError as `open_source`.
    """
    kind = pick("source", name, SOURCES)
    own = {"image_column": image_column, "label_column": label_column, "split_column": split_column}
    for argument, value in {"train_list": listing, **own, CLASS_NAMES: class_names}.items():
        if value is not None and argument not in kind.takes:
            what = f"{printable(value)} is a list" if argument == "train_list" else argument
            raise ValueError(f"{what}, which is for {' and '.join(sources_taking(argument))} only, not for {name}")
    arguments: dict[str, Any] = {
        **{"train_list": listing, "meta_list": None, "test_list": None},
        **own,
        **{"root": _root(kind, root, may_be_made=False) if "root" in kind.takes else None, "download": False},
        **{"num_classes": None, "allow_duplicates": True, "convention": "paper", "cut": None},
        **{key.name: key.default for key in fields(Cut)},
    }
    read = kind.whole or kind.open
    source = read(**{name: arguments[name] for name in inspect.signature(read).parameters})
    return (
        source if class_names is None else replace(source, class_names=named_classes(class_names, source.class_names))
    )


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
