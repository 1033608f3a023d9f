"""Images whose classes are known: of a data set in any form that fastlt reads, or with a list of classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.inference.transform import ReadableImage, StoredImage
from fastlt.inspection.recognition import CONVERTED, recognise
from fastlt.names import nearest
from fastlt.paths import as_path
from loaders.sources import SOURCES, EncodedImages, FileSplit, Split, open_labelled
from loaders.sources.classes import named_classes
from loaders.sources.messages import printable, some
from loaders.sources.split import SPLIT_WORDS
from loaders.stored.dataset import ConvertedDataset

log = logging.getLogger(__name__)

ALL, DEFAULT = "all", "test"
SPLIT_NAMES = {"train": "train", "meta": "val", "test": "test"}


@dataclass(frozen=True)
class DataOptions:
    """Which images of which data set are meant; None is found by what is there.

    source: of SOURCES. root: the folder of the images that a list names; None is that of the list.
    split: "train", "val", "test" or "all"; None is test where the data bring a test set, else all they bring, which is
        one split then.
    image_column, label_column, split_column: of a table. class_names: a file with the names that the network has for
        the classes of the data, as `fastlt convert --class-names` reads it.
    """

    source: str | None = None
    root: Path | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    class_names: Path | None = None

    def __post_init__(self) -> None:
        if self.split not in (None, ALL, *SPLIT_WORDS):
            raise ValueError(f"split is {self.split!r}: allowed are {', '.join(SPLIT_NAMES.values())} and {ALL}")


@dataclass(frozen=True)
class LabelledImages:
    """Images as `predict` takes them, and their labels.

    labels: int64 (N,). split: which one of a data set they are; None where it has no splits.
    """

    images: Any
    labels: np.ndarray
    split: str | None = None


def labelled_images(data: Any, classes: Sequence[str], options: DataOptions) -> LabelledImages:
    """The images of a data set, with labels in the order of `classes`.

    data: a folder with one folder a class, alone or below folders of splits; a list, a table, or COCO's JSON; a folder
        of tar files; of Hugging Face datasets; of CIFAR; "digits"; or a converted data set.
    ValueError for anything else, and for images of classes that are none of `classes`.
    """
    if not isinstance(data, str | os.PathLike):
        raise ValueError(f"a {type(data).__name__} says no classes: give a data set, or the labels of the images")
    found = recognise(as_path(data), source=options.source, root=options.root)
    where = printable(os.fspath(data))
    numbered = False
    if found.source == CONVERTED:
        assert found.root is not None, found
        splits, names = _converted(found.root, options)
    else:
        numbered = SOURCES[found.source].numbered and options.class_names is None
        source = open_labelled(
            found.source,
            root=found.root,
            listing=found.train_list,
            image_column=options.image_column,
            label_column=options.label_column,
            split_column=options.split_column,
            class_names=options.class_names,
        )
        for note in source.notes:
            log.warning("%s", note)
        splits = {split: LabelledImages(_images(part), part.labels) for split, part in source.splits.items()}
        names = source.class_names
    chosen = _chosen(splits, options.split, where)
    count = len(chosen.labels)
    if numbered:
        return replace(chosen, labels=class_labels(chosen.labels, classes, count, where))
    return replace(chosen, labels=class_labels([names[label] for label in chosen.labels], classes, count, where))


def _images(split: Split) -> list[ReadableImage]:
    if isinstance(split, FileSplit):
        return [Path(split.name(i)) for i in range(len(split))]
    read = split.contents if isinstance(split, EncodedImages) else split.image
    return [StoredImage(split.name(i), partial(read, i)) for i in range(len(split))]


def _converted(folder: Path, options: DataOptions) -> tuple[dict[str, LabelledImages], tuple[str, ...]]:
    """The splits of a converted data set, and its class names."""
    for name in ("image_column", "label_column", "split_column"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is of a table, and {printable(folder)} is a converted data set: leave it out")
    dataset = ConvertedDataset.open(folder)
    splits: dict[str, LabelledImages] = {}
    for split in dataset.manifest["splits"]:
        stored, labels = dataset.stored(split, dataset.formats[0]), dataset.labels(split)
        called = f"{printable(folder)}/{split}"
        images: list[ReadableImage] = [
            StoredImage(f"{called}[{i}]", partial(stored.image, i)) for i in range(len(labels))
        ]
        splits[split] = LabelledImages(images, labels)
    names = dataset.class_names
    return splits, names if options.class_names is None else named_classes(options.class_names, names)


def _chosen(splits: dict[str, LabelledImages], asked: str | None, where: str) -> LabelledImages:
    """The images of the split that is asked for; ValueError where it is not there, or none is asked for and must be."""
    there = " and ".join(SPLIT_NAMES[split] for split in splits)
    if asked == ALL or (asked is None and splits.keys() == {"train"}):  # data without splits are all train
        images = [image for part in splits.values() for image in part.images]
        return LabelledImages(images, np.concatenate([part.labels for part in splits.values()]))
    if asked is None and DEFAULT not in splits and len(splits) > 1:
        raise ValueError(f"{where} has the splits {there}: say which by --split (split= in Python), or {ALL}")
    split = SPLIT_WORDS[asked] if asked is not None else DEFAULT if DEFAULT in splits else next(iter(splits))
    if split not in splits:
        raise ValueError(f"{where} has no split {asked}, only {there}")
    return replace(splits[split], split=SPLIT_NAMES[split])


def class_labels(
    labels: Sequence[str] | Sequence[int] | np.ndarray, classes: Sequence[str], count: int, where: str = "labels"
) -> np.ndarray:
    """The labels of `count` images, given as names or numbers: int64 (count,). ValueError for others.

    where: they come from, in messages.
    """
    if len(labels) != count:
        raise ValueError(f"{len(labels)} labels were given for {count} images: give one for each")
    if all(isinstance(label, str) for label in labels):
        return _numbers([str(label) for label in labels], classes, where)
    numbers = np.asarray(labels)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(f"{where}: give the name or the number of each image's class")
    wrong = numbers[(numbers < 0) | (numbers >= len(classes))]
    if len(wrong):
        raise ValueError(f"{where} has {wrong[0]}, and the network has classes 0 to {len(classes) - 1}")
    return numbers.astype(np.int64)


def _numbers(names: Sequence[str], classes: Sequence[str], where: str) -> np.ndarray:
    label_of = {name: label for label, name in enumerate(classes)}
    unknown = sorted(set(names) - label_of.keys())
    if unknown:
        near = nearest(unknown[0], classes) if len(unknown) == 1 else None
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(
            f"{where} has classes that the network does not know: {some(unknown, ', ')}. Its {len(classes):,} classes "
            f"are {some(classes, ', ')}{hint or '. A file gives classes other names: --class-names'}"
        )
    return np.array([label_of[name] for name in names], dtype=np.int64)
