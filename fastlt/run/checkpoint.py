"""Writing and reading the files of a run: a file is whole, and a checkpoint that is not is noticed."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch

from fastlt import strict_json
from fastlt.run.folder import part_file, version_file, versions
from loaders.sources.messages import readable_bytes
from loaders.stored.damage import DamageError

log = logging.getLogger(__name__)


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
    path = Path(os.path.realpath(path))
    part = part_file(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
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


def save(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """torch.save, as `atomic_file` does."""
    with atomic_file(path, keep=keep, needed=lambda: _saved_size(state)) as file:
        torch.save(state, file)


class _Length(io.RawIOBase):
    """A file that keeps nothing but its length."""

    length = 0

    def write(self, data: Any) -> int:
        self.length += len(data)
        return len(data)


def _saved_size(state: dict[str, Any]) -> int:
    file = _Length()
    torch.save(state, cast("IO[bytes]", file))
    return file.length


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


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint; tensors and containers only, nothing in it is executed.

    Raises DamageError when its content is not what was written, RunFileError when it may not be read.
    """
    try:
        with path.open("rb") as file:
            _check_content(file)
            file.seek(0)
            return torch.load(file, map_location=device, weights_only=True)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except (PermissionError, FileNotFoundError, IsADirectoryError) as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:
        reason = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise DamageError(f"{path} is damaged ({reason})") from None


def _check_content(file: IO[bytes]) -> None:
    """zipfile.BadZipFile unless every record has the checksum that torch.save gave it; torch.load does not look."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def load_newest(
    path: Path, device: torch.device | str = "cpu", *, set_aside: bool = False
) -> tuple[Path, dict[str, Any]]:
    """The newest version of `path` that is whole, and its content; a warning names those that are damaged.

    set_aside: whether damaged ones are renamed, so that later versions do not push whole ones out. Raises DamageError
    when none is whole, and leaves all where they are; ValueError when one may not be read.
    """
    damaged: dict[Path, str] = {}
    for version in versions(path).values():
        try:
            state = load(version, device)
        except DamageError as error:
            damaged[version] = str(error)
            continue
        for bad, reason in damaged.items():
            kept = f", kept as {_set_aside(bad).name}" if set_aside else ""
            log.warning("%s%s; taking %s instead, which was saved before", reason, kept, version.name)
        return version, state
    if not damaged:
        raise DamageError(f"{path} is not there")
    raise DamageError(
        f"{'; '.join(damaged.values())}; no other copy was kept. Nothing was changed: put a good copy there, or choose "
        "another name=..., which trains anew"
    )


def _set_aside(path: Path) -> Path:
    """Rename a damaged file; returns where it is."""
    for number in range(1, 1000):
        aside = path.with_name(f"{path.name}.damaged-{number}")
        if not aside.exists():
            return path.rename(aside)
    raise AssertionError(f"{path}: a thousand damaged files")
