"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Metadata of a dataclass field of type str that is a path.
PATH: dict[str, Any] = {"path": True}


def as_path(word: str | os.PathLike[str]) -> Path:
    """`expand` as a Path. What is called `~x` here, written `./~x`, is absolute: `Path` drops the dot that says so."""
    found = Path(expand(os.fspath(word)))
    return found.absolute() if str(found).startswith("~") else found


def expand(path: str) -> str:
    """The path with a leading `~` or `~user` replaced by that home folder; ValueError where there is no such user.

    Environment variables are not replaced, and a path without `~` stays letter by letter.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        user = Path(path).parts[0]
        raise ValueError(f"{path}: there is no home folder {user} here; write the whole path, or ~ for yours") from None
