"""The errors of reading: data that were damaged, readers that failed; and reading arrays that may be damaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


class DamageError(ValueError, RuntimeError):
    """Data that were whole once are not any more; the message says which, and what to do.

    A ValueError, because the user's data are wrong; a RuntimeError, because readers' threads raise it.
    """


class ReaderError(RuntimeError):
    """A loader's process or thread failed, and not because of the data; the message says why, and what to do."""


class RemoteError(ReaderError, ValueError):
    """A server did not give a file, however often it was asked; the message has its answer, and what to do.

    A ValueError, because before training it is a matter of the user's surroundings.
    """


class RefusedError(RemoteError):
    """A server has answered that it does not give a file: it is not there, or may not be read."""


class NoRoomError(ValueError, RuntimeError):
    """There is no room on the disk or in memory for what has to be there; the message says where, and what to do."""


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The arrays `names` of an .npz file; DamageError, with the reason only, when it is not what `np.savez` wrote.

    ValueError when it may not be read.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged archive raises nearly anything: BadZipFile, NotImplementedError, KeyError, …
        raise DamageError(f"{type(error).__name__}: {error}") from None
