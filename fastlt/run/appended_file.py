"""A file of a run that grows while it trains, and is cut back to the checkpoint when it goes on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

from fastlt.run.atomic_file import RunFileError, not_written, write_atomically


class AppendedFile:
    """The base of what is appended to record by record: a subclass reads its records, and says which are kept.

    Only the main process writes (`enabled`); the others count along.
    """

    def __init__(self, path: Path, *, enabled: bool) -> None:
        self.path, self.enabled = path, enabled
        self.file: IO[bytes] | None = None

    def begin(self, kept: bytes) -> None:
        """Let the file hold `kept` alone, and open it for more."""
        write_atomically(self.path, kept)
        self.file = self.path.open("ab")

    def append(self, record: bytes) -> None:
        """Write a record where the file is open, and flush it. RunFileError."""
        if self.file is None:
            return
        try:
            self.file.write(record)
            self.file.flush()
        except OSError as error:
            raise RunFileError(not_written(self.path, error)) from None

    def close(self) -> None:
        """Close the file; writing again needs `begin`."""
        if self.file is not None:
            file, self.file = self.file, None
            with contextlib.suppress(OSError):  # of what could not be written; `append` has said so
                file.close()
