"""Writing and reading checkpoints: one that is not whole is noticed."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import IO, Any, cast

import torch

from fastlt.run.atomic_file import RunFileError, atomic_file
from fastlt.run.folder import versions
from loaders.stored.damage import DamageError

log = logging.getLogger(__name__)


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
