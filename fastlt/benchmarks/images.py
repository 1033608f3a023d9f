"""The photographs that a benchmark is given, and sources of one class made of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.sources import ArraySplit, FileSplit, Source

EXTENSIONS = (".jpg", ".jpeg")


def photographs(folder: Path) -> list[Path]:
    """The JPEGs in a folder and all below it, sorted; ValueError where there is none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise ValueError(f"{folder} has no file that ends in {' or '.join(EXTENSIONS)}: give a folder of JPEGs")
    return found


def repeated_photographs(folder: Path, count: int) -> FileSplit:
    """So many of a folder's photographs, in turns."""
    found = photographs(folder)
    return of_one_class(folder, [str(found[i % len(found)].relative_to(folder)) for i in range(count)])


def of_one_class(folder: Path, paths: list[str]) -> FileSplit:
    """Files below a folder, all of one class."""
    return FileSplit(folder, paths, np.zeros(len(paths), dtype=np.int64), "benchmark")


def source_of(split: ArraySplit | FileSplit, name: str = "train") -> Source:
    """A source with these images in the split of this name, and one of them in each other."""
    one = split.subset(np.arange(1))
    return Source("benchmark", ("one class",), {"train": one, "meta": one, "test": one, name: split})
