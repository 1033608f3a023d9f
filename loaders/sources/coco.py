"""COCO's JSON with `images`, `annotations` and `categories`, in which iNaturalist is published, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loaders.sources.classes import number_classes
from loaders.sources.cut import Cut
from loaders.sources.listing import Listing, listed_files, named_lists, read_bytes
from loaders.sources.messages import printable, shortened, some
from loaders.sources.source import Source

WANTED = "a JSON file with images, annotations and categories"
KEYS = {"images": ("id", "file_name"), "annotations": ("image_id", "category_id"), "categories": ("id",)}


def open_coco(
    root: Path,
    *,
    train_list: str | Path | None,
    meta_list: str | Path | None,
    test_list: str | Path | None,
    cut: Cut | None,
    allow_duplicates: bool = False,
) -> Source:
    """Read one JSON file a split; the classes are the categories with training images, in the order of their ids.

    A split without a file comes from the others by the rules of `Cut`.
    Raises ValueError for a file of another form, an image with annotations of two categories, and as `list_file`.
    """
    given = named_lists("coco", WANTED, train_list=train_list, meta_list=meta_list, test_list=test_list)
    files = {name: _read(path) for name, path in given.items()}
    lists = {name: file.listing for name, file in files.items()}
    where = {name: part.where for name, part in lists.items()}
    called = _names(files)
    classes = {name: part.classes for name, part in lists.items()}
    labels, names = number_classes(classes, where, called.__getitem__, cut=cut)
    pools, _ = listed_files(root, lists, labels, allow_duplicates=allow_duplicates)
    notes = tuple(note for file in files.values() for note in file.notes)
    unused = len(called) - len(names)
    if unused:
        notes += (f"{where['train']}: {unused:,} of {len(called):,} categories have no image and are left out",)
    return Source.of_pools("coco", pools, names, cut, notes)


@dataclass(frozen=True)
class _CocoFile:
    """listing: its annotated images. categories: the name of each, by its id. notes: what was not read."""

    listing: Listing[int]
    categories: Mapping[int, str]
    notes: tuple[str, ...]


def _read(path: Path) -> _CocoFile:
    where = printable(path)
    content = _content(path, where)
    for name in ("images", "categories"):
        number = Counter(one["id"] for one in content[name])
        twice = [str(key) for key, count in number.items() if count > 1]
        if twice:
            raise ValueError(
                f"{where}: {len(twice):,} ids of {name!r} stand there more than once ({some(twice[:10])}): give each "
                "image and category its own"
            )
    categories = {one["id"]: str(one.get("name", one["id"])) for one in content["categories"]}
    category_of: dict[Any, int] = {}
    several = {}
    for one in content["annotations"]:
        first = category_of.setdefault(one["image_id"], one["category_id"])
        if first != one["category_id"]:
            several[one["image_id"]] = first, one["category_id"]
    file_of = {one["id"]: one["file_name"] for one in content["images"]}
    if several:
        listed = [f"{shortened(str(file_of.get(image, image)))}: {a} and {b}" for image, (a, b) in several.items()]
        raise ValueError(
            f"{where}: {len(several):,} images have annotations of several categories ({some(listed[:10])}), and a "
            "classifier needs one class an image: cut the objects out, or keep one annotation of each"
        )
    unknown = sorted({str(category) for category in category_of.values() if category not in categories})
    if unknown:
        raise ValueError(f"{where}: annotations have categories that it does not list: {some(unknown, ', ')}")
    strange = [str(image) for image in category_of if image not in file_of]
    if strange:
        raise ValueError(f"{where}: annotations have images that it does not list: {some(strange, ', ')}")
    ids = [image for image in file_of if image in category_of]
    if not ids:
        raise ValueError(f"{where} has no annotated image: give {WANTED}")
    bare = len(file_of) - len(ids)
    notes = (f"{where}: {bare:,} images without an annotation are not read",) if bare else ()
    place = {image: number for number, image in enumerate(file_of, start=1)}
    lines = np.array([place[image] for image in ids], dtype=np.int64)
    listing = Listing(path, [file_of[image] for image in ids], [category_of[i] for i in ids], lines, "image")
    return _CocoFile(listing, categories, notes)


def _content(path: Path, where: str) -> dict[str, list[dict[str, Any]]]:
    """The lists of KEYS; ValueError for what has another form."""
    try:
        content = json.loads(read_bytes(path, WANTED))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}): give {WANTED}") from None
    for name, keys in KEYS.items():
        part = content.get(name) if isinstance(content, dict) else None
        if not isinstance(part, list):
            raise ValueError(f"{where} has no list {name!r}: give {WANTED}; a file without labels cannot be used")
        for key in keys:
            wrong = next(
                (i for i, one in enumerate(part) if not isinstance(one, dict) or not _fits(one.get(key), key)), None
            )
            if wrong is not None:
                raise ValueError(f"{where}: entry {wrong} of {name!r} has no usable {key!r}: give {WANTED}")
    return content


def _fits(value: Any, key: str) -> bool:
    kinds = {"file_name": str, "category_id": int}
    return isinstance(value, kinds.get(key, (int, str)))


def _names(files: Mapping[str, _CocoFile]) -> dict[int, str]:
    """The name of each category; one that several have goes with its id. ValueError for files that disagree."""
    names: dict[int, str] = {}
    for file in files.values():
        for category, name in file.categories.items():
            if names.setdefault(category, name) != name:
                raise ValueError(
                    f"{file.listing.where}: category {category} is {shortened(name)!r}, and "
                    f"{shortened(names[category])!r} in another file: the files are of different data sets"
                )
    times = Counter(names.values())
    return {category: name if times[name] == 1 else f"{name} ({category})" for category, name in names.items()}
