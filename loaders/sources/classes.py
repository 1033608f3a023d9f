"""From what a data set calls its classes to labels 0, 1, 2, … and class names."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from loaders.sources.messages import printable, some

Class = TypeVar("Class", str, int)


def number_classes(
    of_images: Mapping[str, Sequence[Class]],
    where: Mapping[str, str],
    name: Callable[[Class], str] = str,
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The labels of each split, int64 (N,), and the class names. The classes are those of train, sorted.

    of_images: the class of each image, by split. where: what each split is called. name: of a class.
    Names that are not UTF-8 are spelled with backslashes. ValueError for classes that train does not have, and for two
    of one name.
    """
    classes = sorted(set(of_images["train"]))
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


def _unicode_form(unknown: Sequence[str], class_names: Sequence[str]) -> str:
    composed = {unicodedata.normalize("NFC", name) for name in class_names}
    same = all(unicodedata.normalize("NFC", name) in composed for name in unknown)
    return ". The names look the same as in train, but are of another Unicode form (NFC, NFD)" if same else ""
