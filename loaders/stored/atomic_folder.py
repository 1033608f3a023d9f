"""A folder that appears whole or not at all: made under another name, locked meanwhile, and renamed at the end.

What is finished of it when it is interrupted stays under that other name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlt import file_lock

MANIFEST = "manifest.json"  # the last file written; a folder that has it is one of ours, and complete
LOCK = ".lock"
# In the folder where a conversion works: the data set that is to be renamed, and the records of what is finished. The
# name of a record is NUMBER.IMAGES.json.
CONVERTED, PIECES = "converted", "pieces"


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
    elif out.exists() or out.is_symlink():
        raise ValueError(
            f"{out} exists and is not a converted data set: give a folder that does not exist yet or is empty"
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

    Raises ConversionRunningError when another conversion has it; ValueError when it cannot be made, and when the disk
    becomes full. A ValueError from inside says what is kept, too.
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
    try:
        yield work
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{disk_full(out)}{what_is_kept(out)}") from None
    except OtherConversionError:
        raise
    except ValueError as error:
        raise ValueError(f"{error}{what_is_kept(out)}") from error
    finally:
        if not kept_images(out):
            shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


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
    if not (work / PIECES).is_dir() or (work / CONVERTED).exists():
        return
    lock = file_lock.open_locked(work / LOCK, patience_s=0)
    if lock is not None:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def disk_full(out: Path) -> str:
    """What to say when there is no room for `out`."""
    return (
        f"{_real(out).parent} has no space left for {out.name}: make room, store less (--max-resolution, --mode jpg), "
        "or give a folder on another disk"
    )


def partial_folder(out: Path) -> Path:
    """Where a conversion to `out` works."""
    return _real(out).with_name(_real(out).name + ".partial")


def publish(work: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished folder; what it replaces is moved aside first and deleted last."""
    check_target(out, overwrite=overwrite)  # somebody may have made it in the meantime
    out = _real(out)
    old = out.with_name(out.name + ".replaced")
    if (out / MANIFEST).is_file():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    (work / CONVERTED).rename(out)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(work / PIECES, ignore_errors=True)


def write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
