"""ROOT/{train,val,test}/class/image: the layout of torchvision's ImageFolder, one folder a split."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np

from loaders.sources.decode import EXTENSIONS, looks_like_image
from loaders.sources.duplicates import file_keys, refuse_repeated, refuse_shared, same_files
from loaders.sources.messages import printable, shortened, some
from loaders.sources.split import Candidates, FileSplit, Source

META_FOLDERS = ("meta", "val", "valid", "validation")
# What systems put into folders, beside names that begin with a dot; in small letters.
SYSTEM_FOLDERS = frozenset(
    (
        *("@eadir", "@recycle", "#recycle", "#snapshot", "__macosx"),
        *("$recycle.bin", "system volume information", "lost+found"),
    )
)
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini"))


def open_image_folder(
    root: Path,
    *,
    imbalance_factor: float | None,
    meta_per_class: int,
    num_classes: int | None,
    allow_duplicates: bool = False,
) -> Source:
    """Read the folders of `root`; class names are the folders of train, sorted.

    With train, test and one of META_FOLDERS, the meta set is the first `meta_per_class` images of each class of the
    latter. With train and only one of the others, that one is the test set, and the last `meta_per_class` images of
    each class of train (sorted by name) are held out as the meta set.
    Hidden and system files and folders are passed over at every depth. Other files (notes, tables) may lie among the
    images. An image is known by its first bytes where its extension does not say so, and a link `a.jpg` that leads
    nowhere is an image that cannot be read. The notes of the source say what was not read.
    allow_duplicates: whether one file may be in two splits or classes, by links.
    Raises ValueError when a folder, or a class in one of them, is missing.
    """
    folders = _split_folders(root)
    unread = _Unread(root)
    unread.beside(folders)
    names = _class_folders(folders["train"], unread)
    if num_classes is not None and num_classes != len(names):
        raise ValueError(
            f"{printable(folders['train'])} holds {len(names)} classes, num_classes says {num_classes}: correct it"
        )
    pools = {split: _read_folder(root, folder, names, unread) for split, folder in folders.items()}
    if not allow_duplicates:
        _refuse_same_files(root, pools)
    candidates = Candidates(pools, _printable_names(names), meta_per_class, imbalance_factor)
    return Source.of_files("image_folder", candidates, unread.notes())


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of "train" and "test", and of "meta" where there is one."""
    where = printable(root)
    if not (root / "train").is_dir():
        other = next((name for name in _folders_in(root) if name.lower() in ("train", "training")), None)
        hint = f" (it has {printable(other)!r}: rename that)" if other else ""
        raise ValueError(
            f"{where} has no folder 'train'{hint}: expected {where}/train/CLASS/IMAGE, and the same for test"
        )
    meta_folders = [name for name in META_FOLDERS if (root / name).is_dir()]
    if len(meta_folders) > 1:
        raise ValueError(
            f"{where} has {' and '.join(repr(name) for name in meta_folders)}, and one folder can be the validation "
            "set: put the images of both into one, or move the other out of this folder"
        )
    folders = {"train": root / "train"}
    if (root / "test").is_dir():
        folders["test"] = root / "test"
    if meta_folders:
        folders["meta" if "test" in folders else "test"] = root / meta_folders[0]
    if "test" not in folders:
        raise ValueError(f"{where} has neither 'test' nor 'val' beside 'train': there is nothing to evaluate on")
    return folders


def _folders_in(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted; empty when there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


@dataclass
class _Unread:
    """What lies in the folders and is not read: folders beside the splits, system files, files that are no images."""

    root: Path
    folders: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def beside(self, folders: dict[str, Path]) -> None:
        """Note what lies in the root and belongs to no split."""
        read = {folder.name for folder in folders.values()}
        self.folders += [name for name in _folders_in(self.root) if name not in read and not is_system_folder(name)]
        self.loose_in(self.root)

    def loose_in(self, folder: Path) -> None:
        """Note the files that lie in a folder where only folders are read."""
        loose = [entry.name for entry in os.scandir(folder) if not entry.is_dir()]
        self.kinds.update(f"directly in {printable(folder.name)}" for name in loose if not is_system_file(name))

    def hide(self, path: Path, *, folder: bool) -> bool:
        """Whether this is a system file or folder; one that could hold images is noted."""
        if not (is_system_folder(path.name) if folder else is_system_file(path.name)):
            return False
        if folder or path.suffix.lower() in EXTENSIONS:
            self.hidden.append(shortened(printable(path.relative_to(self.root))))
        return True

    def notes(self) -> tuple[str, ...]:
        """One line, when there is anything to say."""
        said = []
        if self.folders:
            said.append(
                f"{len(self.folders)} folders beside the splits ({some([*map(printable, self.folders)], ', ')})"
            )
        if self.hidden:
            said.append(f"{len(self.hidden)} hidden or system files and folders ({some(sorted(self.hidden), ', ')})")
        if self.kinds:
            kinds = [f"{count:,} {kind}" for kind, count in self.kinds.most_common()]
            said.append(f"{self.kinds.total():,} files that are no images of a class ({some(kinds, ', ')})")
        return (f"{printable(self.root)}: not read are {'; '.join(said)}",) if said else ()


def is_system_folder(name: str) -> bool:
    """Whether an operating system or a program keeps a folder of this name for itself."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_system_file(name: str) -> bool:
    """Whether an operating system or a program keeps a file of this name for itself (`._a.jpg` is macOS's)."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def _class_folders(folder: Path, unread: _Unread) -> tuple[str, ...]:
    """The names of the class folders, sorted."""
    names = tuple(name for name in _folders_in(folder) if not unread.hide(folder / name, folder=True))
    if not names:
        raise ValueError(f"{printable(folder)} holds no class folders: expected {printable(folder)}/CLASS/IMAGE")
    return names


def _printable_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The class names of folders. ValueError for two that only their bytes tell apart."""
    texts = tuple(printable(name) for name in names)
    if len(set(texts)) < len(texts):
        twice = sorted(text for text, count in Counter(texts).items() if count > 1)
        raise ValueError(f"{len(twice)} names of class folders are spelled alike: {some(twice)}. Rename one of each")
    return texts


def _read_folder(root: Path, folder: Path, class_names: tuple[str, ...], unread: _Unread) -> FileSplit:
    """Every image below the class folders, sorted by path within the class."""
    present = set(class_names if folder.name == "train" else _class_folders(folder, unread))
    where = printable(folder)
    unknown = sorted(present - set(class_names))
    if unknown:
        raise ValueError(
            f"{where} holds {len(unknown)} classes that train has not: {some([*map(printable, unknown)], ', ')}"
            f"{_unicode_form(unknown, class_names)}"
        )
    unread.loose_in(folder)
    paths, labels, empty = [], [], []
    for label, name in enumerate(class_names):
        found = _images(folder / name, unread) if name in present else []
        if not found:
            empty.append(printable(name))
        paths += [str(path.relative_to(root)) for path in found]
        labels += [label] * len(found)
    if empty:
        raise ValueError(f"{where} has no images of {len(empty)} of {len(class_names)} classes: {some(empty, ', ')}")
    return FileSplit(root, paths, np.array(labels, dtype=np.int64), where)


def _unicode_form(unknown: list[str], class_names: tuple[str, ...]) -> str:
    composed = {unicodedata.normalize("NFC", name) for name in class_names}
    same = all(unicodedata.normalize("NFC", name) in composed for name in unknown)
    return ". The names look the same as in train, but are of another Unicode form (NFC, NFD)" if same else ""


def _images(folder: Path, unread: _Unread) -> list[Path]:
    """The files below `folder` that are called images, readable or not, and those that are images by another name."""
    found, seen = [], set()
    for here, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):  # as torchvision's ImageFolder
        real = os.path.realpath(here)
        if real in seen:  # a link that leads back would be walked for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not unread.hide(Path(here, name), folder=True)]
        for path in (Path(here, name) for name in names):
            if unread.hide(path, folder=False):
                continue
            if path.suffix.lower() in EXTENSIONS or looks_like_image(path):
                found.append(path)
            else:
                unread.kinds[path.suffix.lower() or "without an ending"] += 1
    return sorted(found)


def _unreadable(error: OSError) -> NoReturn:
    raise ValueError(f"{printable(error.filename)} cannot be read ({error.strerror}): its images would be left out")


def _refuse_same_files(root: Path, pools: dict[str, FileSplit]) -> None:
    """No file may be in two splits or in two classes."""
    found = same_files(pools, {split: file_keys(root, pool.paths) for split, pool in pools.items()})

    def describe(split: str, i: int) -> str:
        return shortened(printable(pools[split].paths[i]))

    refuse_shared(found, {split: pool.provenance for split, pool in pools.items()}, describe)
    refuse_repeated(found.two_labels, "are one file in two classes, by links", describe)
