"""A folder that appears whole or not at all: made under another name, locked meanwhile, and renamed at the end."""

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


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """`OUT.partial`, emptied of what a killed conversion left and locked while this one writes; gone afterwards.

    Raises ValueError when it cannot be made, when another conversion has it, and when the disk becomes full.
    """
    work = _partial(out)
    try:
        lock = file_lock.open_locked(work / LOCK)
    except OSError as error:
        raise ValueError(
            f"cannot write next to {out}: {error.strerror} ({error.filename}, where it is made first): give a folder "
            "in another one"
        ) from None
    if lock is None:
        raise ValueError(f"another conversion is writing {work}: wait for it, or give another folder")
    try:
        try:
            for entry in work.iterdir():
                if entry.name != LOCK:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            yield work
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(disk_full(out)) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(lock)


def disk_full(out: Path) -> str:
    """What to say when there is no room for `out`."""
    return (
        f"{_real(out).parent} has no space left for {out.name}; nothing was left behind: make room, store less "
        "(--max-resolution, --mode jpg), or give a folder on another disk"
    )


def _partial(out: Path) -> Path:
    return _real(out).with_name(_real(out).name + ".partial")


def publish(work: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished folder; what it replaces is moved aside first and deleted last."""
    check_target(out, overwrite=overwrite)  # somebody may have made it in the meantime
    (work / LOCK).unlink()
    out = _real(out)
    old = out.with_name(out.name + ".replaced")
    if (out / MANIFEST).is_file():
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
    work.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
