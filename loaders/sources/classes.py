"""From what a data set calls its classes to labels 0, 1, 2, … and class names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from loaders.sources.cut import Cut
from loaders.sources.listing import read_bytes, text_of
from loaders.sources.messages import printable, some

NAMES = "lines of `class name`, or a name a line in the order of the labels"
SEPARATORS = ("\t", ",", None)  # None: any spaces
Class = TypeVar("Class", str, int)


def number_classes(
    of_images: Mapping[str, Sequence[Class]],
    where: Mapping[str, str],
    name: Callable[[Class], str] = str,
    *,
    cut: Cut | None,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of each split, int64 (N,), and the class names, sorted: those of train, or of all without a `cut`.

    of_images: the class of each image, by split. where: what each split is called. name: of a class.
    Names that are not UTF-8 are spelled with backslashes. ValueError for classes that train does not have, and for two
    of one name.
    """
    of_train = (of_images["train"],) if cut is not None else of_images.values()
    classes = sorted({one for found in of_train for one in found})
    label_of = {one: label for label, one in enumerate(classes)}
    names = tuple(printable(name(one)) for one in classes)
    for split, found in of_images.items():
        unknown = sorted(set(found) - label_of.keys())
        if unknown:
            called = [printable(name(one)) for one in unknown]
            raise ValueError(
                f"{where[split]} holds {len(unknown):,} classes that {where['train']} has not: {some(called, ', ')}"
                f"{_unicode_form(called, names)}"
            )
    if len(set(names)) < len(names):
        twice = sorted(text for text, count in Counter(names).items() if count > 1)
        raise ValueError(f"{len(twice)} class names are spelled alike: {some(twice)}. Rename one of each")
    labels = {split: np.array([label_of[one] for one in found], dtype=np.int64) for split, found in of_images.items()}
    return labels, names


def named_classes(path: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """The names that a file gives to classes, in their order.

    A line has a class as the data set calls it, then a tab, a comma or spaces, and its name; further classes may be
    named. Or a line has a name alone, one for each class in the order of the labels.
    ValueError for a file that leaves a class without a name, or gives two the same.
    """
    lines = [line.strip() for line in text_of(read_bytes(path, NAMES), path, NAMES).splitlines() if line.strip()]
    named = [_pairs(lines, separator) for separator in SEPARATORS]
    whole = next((names for names in named if names.keys() >= set(classes)), None)
    if whole is not None:
        found = [whole[one] for one in classes]
    elif len(lines) == len(classes) and not any(names.keys() & set(classes) for names in named):
        found = lines
    else:
        best = max(named, key=lambda names: len(names.keys() & set(classes)))
        lacking = [one for one in classes if one not in best]
        raise ValueError(
            f"{printable(path)} has {len(lines):,} lines, and no name for {len(lacking):,} of {len(classes):,} "
            f"classes: {some(lacking, ', ')}. Give {NAMES}"
        )
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise ValueError(f"{printable(path)} gives several classes one name: {some(twice)}. Give each its own")
    return tuple(printable(name) for name in found)


def _pairs(lines: Sequence[str], separator: str | None) -> dict[str, str]:
    """The second part of each line by the first one."""
    parts = [line.split(separator, 1) for line in lines]
    return {part[0].strip(): part[1].strip() for part in parts if len(part) == 2 and part[1].strip()}


def _unicode_form(unknown: Sequence[str], class_names: Sequence[str]) -> str:
    composed = {unicodedata.normalize("NFC", name) for name in class_names}
    same = all(unicodedata.normalize("NFC", name) in composed for name in unknown)
    return ". The names look the same as in train, but are of another Unicode form (NFC, NFD)" if same else ""
