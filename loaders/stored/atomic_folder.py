"""A folder that appears whole or not at all: made under another name, locked meanwhile, and renamed at the end.

What is finished of it when it is interrupted stays under that other name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastlt import file_lock
from loaders.sources.messages import printable, some

MANIFEST = "manifest.json"  # the last file written; a folder that has it is one of ours, and complete
LOCK = ".lock"
# In the folder where a conversion works: the data set that is to be renamed, the records of what is finished, and how
# images are stored. The name of a record is NUMBER.IMAGES.json.
CONVERTED, PIECES, DESCRIPTION = "converted", "pieces", "conversion.json"
DESCRIBED = frozenset(("source", "formats", "versions"))  # in every DESCRIPTION
PART = ".part"  # the ending of a file that is not whole yet


def check_target(out: Path, *, overwrite: bool) -> None:
    """Raise ValueError when `out` is in the way of a conversion: nothing that we did not make is ever replaced."""
    real = _real(out)
    if real == Path.cwd() or real.is_mount():  # the finished folder takes its place: neither can be replaced
        what = "a mount point" if real.is_mount() else "the current folder"
        raise ValueError(f"{real} is {what}: give a folder below it, such as {out / 'converted'}")
    if out.is_dir() and not any(out.iterdir()):
        return
    if (out / MANIFEST).is_file():
        if not overwrite:
            raise ValueError(f"{out} already holds a converted data set: give another folder, or --overwrite")
        for folder in (real, replaced_folder(out)):  # what is replaced, and where it is put meanwhile
            _refuse_foreign(folder, _foreign_files(folder, _made_files(folder)))
    elif out.exists() or out.is_symlink():
        raise ValueError(
            f"{out} exists and is not a converted data set: give a folder that does not exist yet or is empty"
        )


def refuse_source_inside(out: Path, root: Path) -> None:
    """ValueError when the images of a source lie in a folder that a conversion to `out` replaces or empties."""
    real = _real(root)
    for folder in (_real(out), partial_folder(out), replaced_folder(out)):
        if folder == real or folder in real.parents:
            raise ValueError(
                f"the images lie in {printable(root)}, and a conversion to {printable(out)} replaces "
                f"{printable(folder)}: give another folder to convert to"
            )


def refuse_target_inside(out: Path, root: Path) -> None:
    """ValueError when a conversion would be written among the images of a folder, where a folder is a class."""
    real = _real(root)
    if real == _real(out) or real in _real(out).parents:
        raise ValueError(
            f"{printable(out)} lies in {printable(root)}, the folder of the images, where a folder is a class: give a "
            "folder outside of it"
        )


def _made_files(folder: Path) -> list[str]:
    """The files of a converted data set, by its manifest; none where this is no manifest of ours."""
    manifest = _read_tree(folder / MANIFEST)
    files = manifest.get("files")
    return [MANIFEST, *files] if isinstance(manifest.get("schema"), int) and isinstance(files, dict) else []


def _read_tree(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file; empty where there is none."""
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _foreign_files(folder: Path, made: Collection[str]) -> list[str]:
    """The files in a folder beside those that a conversion has `made`; `folder` itself, ".", where it is a file."""
    if not folder.is_dir() or folder.is_symlink():
        return ["."] if os.path.lexists(folder) else []
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in found} - set(made))


def _refuse_foreign(folder: Path, files: list[str]) -> None:
    if files:
        raise ValueError(
            f"{printable(folder)} would be replaced, and fastlt has not made all that it holds: "
            f"{some([*map(printable, files)], ', ')}. Move it away, or give another folder"
        )


def _real(out: Path) -> Path:
    """Where `out` lies: what is made for it is made there, on the same disk, and a link to a folder stays a link."""
    return Path(os.path.realpath(out))


class OtherConversionError(ValueError):
    """What an unfinished conversion has left belongs to another command."""


class ConversionRunningError(ValueError):
    """Another process converts into the same folder."""


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """`OUT.partial`, locked while this conversion writes; gone afterwards unless it holds finished pieces.

    Raises ConversionRunningError when another conversion has it; ValueError when it cannot be made or holds what no
    conversion has made, and when the disk becomes full or a file too large. A ValueError from inside says what is
    kept, too.
    """
    work = partial_folder(out)
    try:
        lock = file_lock.open_locked(work / LOCK)
    except OSError as error:
        raise ValueError(
            f"cannot write next to {out}: {error.strerror} ({error.filename}, where it is made first): give a folder "
            "in another one"
        ) from None
    if lock is None:
        raise ConversionRunningError(f"another conversion is writing {work}: wait for it, or give another folder")
    if not _is_work_folder(work) and (foreign := _foreign_files(work, (LOCK, DESCRIPTION + PART))):
        (work / LOCK).unlink()
        os.close(lock)
        _refuse_foreign(work, foreign)
    try:
        yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = file_too_large(out) if error.errno == errno.EFBIG else disk_full(out)
        raise ValueError(f"{reason}{what_is_kept(out)}") from None
    except OtherConversionError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}{what_is_kept(out)}") from error
    finally:
        if not kept_images(out):
            _remove_work(work)
        os.close(lock)


def _is_work_folder(folder: Path) -> bool:
    return _read_tree(folder / DESCRIPTION).keys() >= DESCRIBED


def _remove_work(work: Path) -> None:
    """Remove the folder of a conversion, what tells that it is one last."""
    for name in (CONVERTED, PIECES):
        shutil.rmtree(work / name, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)


def kept_images(out: Path) -> int:
    """How many images a conversion to `out` that has not ended has finished."""
    return sum(int(path.name.split(".")[1]) for path in (partial_folder(out) / PIECES).glob("*.*.json"))


def what_is_kept(out: Path) -> str:
    """The sentence of a conversion that does not end, behind its message; empty where nothing is kept."""
    count = kept_images(out)
    return (
        f"\n{count:,} finished images are kept in {partial_folder(out)}: the same command goes on from there, and "
        "with --restart from the beginning"
        if count
        else ""
    )


def remove_published(out: Path) -> None:
    """Remove what a conversion has left that was killed when its folder had its name already."""
    work = partial_folder(out)
    if not _is_work_folder(work) or (work / CONVERTED).exists():
        return
    lock = file_lock.open_locked(work / LOCK, patience_s=0)
    if lock is not None:
        _remove_work(work)
        os.close(lock)


def disk_full(out: Path) -> str:
    """What to say when there is no room for `out`."""
    return (
        f"{_real(out).parent} has no space left for {out.name}: make room, store less (--max-resolution, --mode jpg), "
        "or give a folder on another disk"
    )


def file_too_large(out: Path) -> str:
    """What to say when a file of `out` is larger than any may be."""
    return (
        f"a file of {out.name} is larger than the file system of {_real(out).parent}, or `ulimit -f`, allows: store "
        "less (--max-resolution, --mode jpg) or shards (--format dali), or give a folder on another disk"
    )


def partial_folder(out: Path) -> Path:
    """Where a conversion to `out` works."""
    return _real(out).with_name(_real(out).name + ".partial")


def replaced_folder(out: Path) -> Path:
    """Where the data set lies that a conversion to `out` replaces, until the new one has its name."""
    return _real(out).with_name(_real(out).name + ".replaced")


def publish(work: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished folder, all on the disk; what it replaces is moved aside first and deleted last."""
    check_target(out, overwrite=overwrite)  # somebody may have made it in the meantime
    for path in [*(work / CONVERTED).rglob("*"), work / CONVERTED]:
        _flush(path)
    old, out = replaced_folder(out), _real(out)
    if (out / MANIFEST).is_file():
        _remove_dataset(old)
        out.rename(old)
    (work / CONVERTED).rename(out)
    _flush(out.parent)
    _remove_dataset(old)
    shutil.rmtree(work / PIECES, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # which some file systems cannot flush
            raise
    finally:
        os.close(descriptor)


def _remove_dataset(folder: Path) -> None:
    """Remove a converted data set, what tells that it is one last; nothing where it holds files of others."""
    if _foreign_files(folder, _made_files(folder)):
        return
    for name in _made_files(folder)[1:]:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def write_durably(path: Path, text: str) -> None:
    """Write a file that is whole or absent, on the disk before anything that follows."""
    part = path.with_name(path.name + PART)
    with part.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
