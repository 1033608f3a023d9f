"""Which source a folder or a file is, by what is there."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastlt.names import pick
from loaders.sources import SOURCES, sources_taking
from loaders.sources.cifar import CIFAR10, CIFAR100
from loaders.sources.columns import LABEL_COLUMNS
from loaders.sources.decode import EXTENSIONS
from loaders.sources.messages import printable
from loaders.sources.table import DELIMITERS, PARQUET_START
from loaders.stored.atomic_folder import MANIFEST

CONVERTED = "converted"
HF_FILES = ("dataset_dict.json", "state.json")
TAR_AT = 257  # a tar file says `ustar` there
PEEKED = 4096  # bytes of a list that are read to know its form
MOST_ENTRIES = 100_000  # looked at in search of the first image or tar file


@dataclass(frozen=True)
class Recognised:
    """source: a name of SOURCES, or CONVERTED. root, train_list: where it is, as `open_source` takes them.

    why: what it was known by, for the user.
    """

    source: str
    why: str
    root: Path | None = None
    train_list: Path | None = None


def recognise(
    data: Path, *, source: str | None = None, root: Path | None = None, train_list: Path | None = None
) -> Recognised:
    """What `data` is; ValueError where nothing there tells.

    source, root, train_list: what the user says; only the rest is found.
    """
    if source is not None:
        pick("source", source, SOURCES)
    if not data.exists():
        name = source or str(data)
        if name in SOURCES and name not in sources_taking("root"):
            return Recognised(name, "it comes with a library")
        raise ValueError(f"{printable(data.absolute())} does not exist: give a folder of images, or a list of them")
    if data.is_file():
        if train_list is not None:
            raise ValueError(f"{printable(data)} and --train-list are both lists: give the folder of the images first")
        named, why = (source, "--source says so") if source else _of_list(data)
        return Recognised(named, why, root or data.parent, data)
    if root is not None:
        raise ValueError(f"{printable(data)} is a folder, and --root names another: leave --root out")
    if train_list is not None:
        named, why = (source, "--source says so") if source else _of_list(train_list)
        return Recognised(named, why, data, train_list)
    if source is not None:
        return Recognised(source, "--source says so", data)
    return _of_folder(data)


def _of_folder(folder: Path) -> Recognised:
    if (folder / MANIFEST).is_file():
        return Recognised(CONVERTED, f"it has a {MANIFEST}", folder)
    for name in HF_FILES:
        if (folder / name).is_file():
            return Recognised("hf_dataset", f"it has a {name}", folder)
    for spec in (CIFAR10, CIFAR100):
        for form in spec.forms:
            for name in (form.folder, form.archive):
                if (folder / name).exists():
                    return Recognised(spec.name, f"it has {name}", folder)
    for entry in _files(folder):
        ending = os.path.splitext(entry)[1].lower()
        if ending in EXTENSIONS:
            break
        if ending == ".tar":
            return Recognised("webdataset", "it has tar files", folder)
    split = "train/" if (folder / "train").is_dir() else ""
    return Recognised("image_folder", f"it has folders, {split}CLASS/IMAGE", folder)


def _files(folder: Path) -> Iterator[str]:
    """The names of the first files in a folder and in those below it."""
    seen = 0
    for _, folders, names in os.walk(folder):
        folders.sort()
        yield from names
        seen += len(folders) + len(names)
        if seen > MOST_ENTRIES:
            return


def _of_list(path: Path) -> tuple[str, str]:
    """The source that reads a list, and why; ValueError for a file that is none."""
    where = printable(path)
    try:
        with path.open("rb") as file:
            start = file.read(PEEKED)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror}") from None
    if start.startswith(PARQUET_START):
        return "table", "it is a Parquet file"
    if start[TAR_AT:].startswith(b"ustar"):
        raise ValueError(f"{where} is a tar file: give the folder that holds the tar files, or unpack it")
    if b"\0" in start:
        raise ValueError(f"{where} is neither a list of images nor a folder: give one of them")
    text = os.fsdecode(start).lstrip("\ufeff \t\r\n")
    if text.startswith("{"):
        return "coco", "it is JSON, as COCO's"
    header = text.split("\n", 1)[0].strip()
    delimiter = max(DELIMITERS, key=header.count)
    columns = {column.strip().lower() for column in next(csv.reader([header], delimiter=delimiter), [])}
    if columns & LABEL_COLUMNS or (path.suffix.lower() in (".csv", ".tsv") and len(columns) > 1):
        return "table", f"its first line names columns: {header[:60]}"
    return "list_file", "its lines are `path label`"
