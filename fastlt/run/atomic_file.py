"""Writing the files of a run: a file is whole, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastlt import strict_json
from fastlt.run.folder import part_file, version_file, versions
from loaders.sources.messages import readable_bytes


class RunFileError(ValueError):
    """A file of a run could not be written or read, for want of space or permission; nothing was lost."""


@contextmanager
def atomic_file(path: Path, *, keep: int = 1, needed: Callable[[], int] | None = None) -> Iterator[IO[bytes]]:
    """A file to write in, which takes the place of `path` at the end of the context.

    A kill at any moment leaves the old content or the new, never a part; an error leaves the old. The keep - 1 newest
    files that were at `path` before stay, see `versions`. Links are followed. A device or a pipe is written to as it
    is. Raises RunFileError where the file cannot be written.

    needed: tells the bytes that will be written, for the error.
    """
    # A pipe behind /dev/stdout has no name of its own that a link could be followed to.
    unnamed = path.exists() and not path.is_file() and not path.is_dir()
    path = path if unnamed else Path(os.path.realpath(path))
    part = part_file(path)
    try:
        if unnamed:
            with path.open("wb") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _keep_versions(path, keep)
        part.replace(path)
    except (OSError, RuntimeError) as error:
        cause = _system_error(error)
        if cause is None:
            raise
        _remove(part)  # before the room that is left is measured
        raise RunFileError(not_written(path, cause, needed)) from None
    finally:
        _remove(part)


def _remove(part: Path) -> None:
    with contextlib.suppress(OSError):  # where nothing can be removed, nothing was written
        part.unlink(missing_ok=True)


def _system_error(error: BaseException) -> OSError | None:
    """The OSError behind an error: torch.save hides it behind one of its own."""
    if isinstance(error, OSError) or error.__context__ is None:
        return error if isinstance(error, OSError) else None
    return _system_error(error.__context__)


def not_written(path: Path, error: OSError, needed: Callable[[], int] | None = None) -> str:
    """The message for a file that could not be written. needed: as in `atomic_file`."""
    if error.errno == errno.EFBIG:
        return (
            f"{path} cannot be written: {error.strerror} for its file system, or for `ulimit -f`. What was saved "
            "before is whole: raise the limit or put the folder on another disk, and give the same command again"
        )
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{path} cannot be written: {error.strerror}. What was saved before is whole"
    wanted = "" if needed is None else f"{readable_bytes(needed())} needed, "
    room = f"{wanted}{readable_bytes(shutil.disk_usage(path.parent).free)} free"
    return (
        f"{path} cannot be written: {error.strerror} ({room}). What was saved before is whole: make room, and give the "
        "same command again"
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file, as `atomic_file` does."""
    with atomic_file(path, needed=lambda: len(content)) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """JSON that a person can read, written atomically."""
    write_atomically(path, (strict_json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path, remedy: str = "move it away to measure the run again") -> Any:
    """The content of a JSON file; ValueError when it is damaged, with the remedy, or may not be read.

    remedy: what the user can do about a damaged file; that of a result if not given.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from None
    except OSError as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from None


def _keep_versions(path: Path, keep: int) -> None:
    """Make place for a new file at `path`: its versions move up by one, and those beyond `keep` go.

    `path` itself stays where it is until it is replaced, so that a whole file is there at every moment.
    """
    older = {number: version for number, version in versions(path).items() if number > 0}
    for number in sorted(older, reverse=True):
        if number + 1 < keep:
            older[number].replace(version_file(path, number + 1))
        else:
            older[number].unlink()
    if keep > 1 and path.exists():
        try:
            os.link(path, version_file(path, 1))
        except OSError:  # a file system without links: for a moment, the newest has the other name
            path.replace(version_file(path, 1))
