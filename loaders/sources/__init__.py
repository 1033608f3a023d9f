"""Where images come from: one file a source, each opened by `open_source`."""

from __future__ import annotations

import math
from pathlib import Path

from fastlt.names import pick
from loaders.order.longtail import CONVENTIONS
from loaders.sources.cifar import CIFAR10, CIFAR100, CifarSpec, open_cifar
from loaders.sources.digits import open_digits
from loaders.sources.image_folder import open_image_folder
from loaders.sources.list_file import open_list_files
from loaders.sources.split import ArraySplit, FileSplit, Source, Split

__all__ = ["SOURCES", "ArraySplit", "FileSplit", "Source", "Split", "open_source"]


def _open_digits(arguments: dict) -> Source:
    return open_digits(**_only(arguments, "imbalance_factor", "meta_per_class", "seed"))


def _open_cifar10(arguments: dict) -> Source:
    return _open_cifar(CIFAR10, arguments)


def _open_cifar100(arguments: dict) -> Source:
    return _open_cifar(CIFAR100, arguments)


def _open_cifar(spec: CifarSpec, arguments: dict) -> Source:
    root = _root(arguments, spec.name)
    return open_cifar(spec, root, **_only(arguments, "imbalance_factor", "convention", "meta_per_class", "download"))


def _open_image_folder(arguments: dict) -> Source:
    root = _root(arguments, "image_folder")
    return open_image_folder(root, **_only(arguments, "imbalance_factor", "meta_per_class", "num_classes"))


def _open_list_files(arguments: dict) -> Source:
    root = _root(arguments, "list_file")
    lists = _only(arguments, "train_list", "meta_list", "test_list")
    return open_list_files(root, **lists, **_only(arguments, "imbalance_factor", "meta_per_class", "num_classes"))


SOURCES = {
    "digits": _open_digits,
    "cifar10": _open_cifar10,
    "cifar100": _open_cifar100,
    "image_folder": _open_image_folder,
    "list_file": _open_list_files,
}


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
) -> Source:
    """Find a data set and cut it into the splits "train", "meta" and "test"; nothing is decoded yet.

    root: the folder with the data; `digits` needs none.
    train_list, meta_list, test_list: for `list_file`; without a meta list, images are held out of train.
    download: whether CIFAR may be fetched when it is not under `root`.
    num_classes: what the data set must have, or None to take what it has.
    imbalance_factor: largest over smallest class of the long tail to cut, None for the data set as it is.
    convention: "paper" or "ldam", how CIFAR is cut (`loaders.order.longtail`).
    seed: which digits are held out; the other sources are cut by file order.
    Raises ValueError, saying what to do, when the data are missing or not what they should be.
    """
    opener = pick("source", name, SOURCES)
    pick("convention", convention, CONVENTIONS)
    if imbalance_factor is not None and not 1 <= imbalance_factor < math.inf:
        raise ValueError(f"imbalance_factor is {imbalance_factor}: it must be a number from 1 (balanced) on")
    if meta_per_class < 1:
        raise ValueError(f"meta_per_class is {meta_per_class}: it must be at least 1")
    arguments = {
        "root": root,
        "train_list": train_list,
        "meta_list": meta_list,
        "test_list": test_list,
        "download": download,
        "num_classes": num_classes,
        "imbalance_factor": imbalance_factor,
        "convention": convention,
        "meta_per_class": meta_per_class,
        "seed": seed,
    }
    source = opener(arguments)
    if num_classes is not None and num_classes != source.num_classes:
        raise ValueError(f"{name} has {source.num_classes} classes, num_classes says {num_classes}: correct it")
    return source


def _only(arguments: dict, *names: str) -> dict:
    return {name: arguments[name] for name in names}


def _root(arguments: dict, name: str) -> Path:
    """The folder as a Path; a missing one is an error, except that CIFAR's may be made by its download."""
    if arguments["root"] is None:
        raise ValueError(f"{name} needs a root: the folder that holds its images")
    root = Path(arguments["root"]).expanduser()
    if not root.exists() and not (name.startswith("cifar") and arguments["download"]):
        raise ValueError(f"root {root.absolute()} does not exist: {name} needs the folder that holds its images")
    return root
