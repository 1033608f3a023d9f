"""ROOT/{train,val,test}/class/image, the layout of torchvision's ImageFolder, or ROOT/class/image alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from loaders.sources.classes import number_classes
from loaders.sources.cut import Cut
from loaders.sources.decode import EXTENSIONS, looks_like_image
from loaders.sources.duplicates import file_keys, refuse_repeated, refuse_shared, same_files
from loaders.sources.messages import printable, shortened, some
from loaders.sources.source import Source
from loaders.sources.split import FileSplit

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
    root: Path, *, cut: Cut | None, num_classes: int | None, allow_duplicates: bool = False
) -> Source:
    """Read the folders of `root`; class names are the folders of train, sorted.

    Without a folder "train", the folders of `root` are the classes. A split without a folder, "test" or one of
    META_FOLDERS, comes from the others by the rules of `Cut`. Without a cut there need be no train.
    Hidden and system files and folders are passed over at every depth. Other files (notes, tables) may lie among the
    images. An image is known by its first bytes where its extension does not say so, and a link `a.jpg` that leads
    nowhere is an image that cannot be read. The notes of the source say what was not read.
    allow_duplicates: whether one file may be in two splits or classes, by links.
    Raises ValueError when train lacks a class, or images of one.
    """
    folders = _split_folders(root)
    if cut is not None:
        _check_train(root, folders)
    unread = _Unread(root)
    paths, classes = {}, {}
    if folders:
        unread.beside(folders)
        for split, folder in folders.items():
            paths[split], classes[split] = _read_folder(
                root, folder, unread, all_classes=split == "train" and cut is not None
            )
    else:
        folders = {"train": root}
        paths["train"], classes["train"] = _read_folder(root, root, unread, all_classes=False)
        _check_images(root, paths["train"], unread)
        if cut is not None:
            _check_several(root, classes["train"])
    where = {split: printable(folder) for split, folder in folders.items()}
    if num_classes is not None and num_classes != len(set(classes["train"])):
        found = len(set(classes["train"]))
        raise ValueError(f"{where['train']} holds {found} classes, num_classes says {num_classes}: correct it")
    labels, names = number_classes(classes, where, cut=cut)
    pools = {split: FileSplit(root, paths[split], labels[split], where[split]) for split in folders}
    if not allow_duplicates:
        _refuse_same_files(root, pools)
    return Source.of_pools("image_folder", pools, names, cut, unread.notes())


def _check_train(root: Path, folders: dict[str, Path]) -> None:
    """ValueError for folders of splits without train, or of one that is spelled otherwise."""
    if "train" in folders:
        return
    where = printable(root)
    other = next((name for name in _folders_in(root) if name.lower() in ("train", "training")), None)
    if other or folders:
        beside = " and ".join(folder.name for folder in folders.values())
        hint = f" (it has {printable(other)!r}: rename that)" if other else f" beside {beside}"
        raise ValueError(f"{where} has no folder 'train'{hint}: expected {where}/train/CLASS/IMAGE")


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits that there are, by the splits' names; none where the folders are classes."""
    where = printable(root)
    meta_folders = [name for name in META_FOLDERS if (root / name).is_dir()]
    if len(meta_folders) > 1:
        raise ValueError(
            f"{where} has {' and '.join(repr(name) for name in meta_folders)}, and one folder can be the validation "
            "set: put the images of both into one, or move the other out of this folder"
        )
    folders = {"train": root / "train"} if (root / "train").is_dir() else {}
    if meta_folders:
        folders["meta"] = root / meta_folders[0]
    if (root / "test").is_dir():
        folders["test"] = root / "test"
    return folders


def _check_images(root: Path, paths: list[str], unread: _Unread) -> None:
    """ValueError for a folder whose folders have no images."""
    where = printable(root)
    if not paths:
        kinds = f"; it holds {unread.kinds_text()}" if unread.kinds else ""
        raise ValueError(
            f"{where} holds no images in folders: expected {where}/train/CLASS/IMAGE or {where}/CLASS/IMAGE{kinds}"
        )


def _check_several(root: Path, classes: list[str]) -> None:
    """ValueError for a folder of one class: it may be that of all images, in a folder above the one that is meant."""
    where = printable(root)
    if len(set(classes)) == 1:
        inner = printable(root / classes[0])
        raise ValueError(
            f"{where} has images in one folder only, {printable(classes[0])!r}, so there is one class: give {inner} as "
            "root if its folders are the classes or the splits"
        )


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
    folders_are: str = "beside the splits"
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

    def hide(self, path: Path, folder: bool) -> bool:
        """Whether this is a system file or folder; one that could hold images is noted."""
        if not is_system(path, folder):
            return False
        if folder or path.suffix.lower() in EXTENSIONS:
            self.hidden.append(shortened(printable(path.relative_to(self.root))))
        return True

    def kinds_text(self) -> str:
        """How many files of which kinds are no images of a class."""
        return some([f"{count:,} {kind}" for kind, count in self.kinds.most_common()], ", ")

    def notes(self) -> tuple[str, ...]:
        """One line, when there is anything to say."""
        said = []
        if self.folders:
            listed = some([*map(printable, self.folders)], ", ")
            said.append(f"{len(self.folders)} folders {self.folders_are} ({listed})")
        if self.hidden:
            said.append(f"{len(self.hidden)} hidden or system files and folders ({some(sorted(self.hidden), ', ')})")
        if self.kinds:
            said.append(f"{self.kinds.total():,} files that are no images of a class ({self.kinds_text()})")
        return (f"{printable(self.root)}: not read are {'; '.join(said)}",) if said else ()


def is_system_folder(name: str) -> bool:
    """Whether an operating system or a program keeps a folder of this name for itself."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_system_file(name: str) -> bool:
    """Whether an operating system or a program keeps a file of this name for itself (`._a.jpg` is macOS's)."""
    return name.startswith(".") or name.lower() in SYSTEM_FILES


def is_system(path: Path, folder: bool) -> bool:
    """`is_system_folder` of a folder, `is_system_file` of a file."""
    return is_system_folder(path.name) if folder else is_system_file(path.name)


def files_below(
    folder: Path, onerror: Callable[[OSError], object], hide: Callable[[Path, bool], bool] = is_system
) -> Iterator[tuple[Path, bool]]:
    """The files below `folder`, links followed, and of each whether it is an image, by its extension or first bytes.

    The order is that of names, wherever the folder lies, and a folder that is there by several names has the one that
    is no link, else the first.
    onerror: told of a folder that may not be read. hide: whether a file, or a folder (True) with all in it, is passed
        over.
    """
    seen, tops = set(), [str(folder)]
    for top in tops:  # links to folders are added meanwhile, followed as by torchvision's ImageFolder
        for here, folders, names in os.walk(top, onerror=onerror):
            real = os.path.realpath(here)
            if real in seen:  # a link that leads back would be walked for ever
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not hide(Path(here, name), True))
            tops += [path for name in folders if os.path.islink(path := os.path.join(here, name))]
            for path in (Path(here, name) for name in sorted(names)):
                if not hide(path, False):
                    yield path, path.suffix.lower() in EXTENSIONS or looks_like_image(path)


def _read_folder(root: Path, folder: Path, unread: _Unread, *, all_classes: bool) -> tuple[list[str], list[str]]:
    """The path, relative to `root`, and the class of every image below the class folders, sorted by class and path.

    all_classes: whether every folder has to have an image; ValueError else.
    """
    where = printable(folder)
    names = [name for name in _folders_in(folder) if not unread.hide(folder / name, folder=True)]
    if not names and folder != root:
        raise ValueError(f"{where} holds no class folders: expected {where}/CLASS/IMAGE")
    unread.loose_in(folder)
    paths, classes, empty = [], [], []
    for name in names:
        found = _images(folder / name, unread)
        if not found:
            empty.append(name)
        paths += [str(path.relative_to(root)) for path in found]
        classes += [name] * len(found)
    if empty and all_classes:
        raise ValueError(
            f"{where} has no images of {len(empty)} of {len(names)} classes: {some([*map(printable, empty)], ', ')}"
        )
    if folder == root:
        unread.folders, unread.folders_are = empty, "without images"
    return paths, classes


def _images(folder: Path, unread: _Unread) -> list[Path]:
    """The files below `folder` that are called images, readable or not, and those that are images by another name."""
    found = []
    for path, is_image in files_below(folder, _unreadable, unread.hide):
        if is_image:
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
