"""Reading the files of a remote data set once, without a copy, and saying what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from loaders.stored.cached_folder import FETCHERS
from loaders.stored.damage import DamageError, RefusedError
from loaders.stored.progress import progress_bar
from loaders.stored.remote_folder import FileEntry, RemoteFolder


def verify_remote(
    remote: RemoteFolder, manifest: Mapping[str, Any], *, connections: int | None = None, progress: bool = True
) -> list[str]:
    """What is wrong with the files of a data set, one line each; empty when each is there and its checksum holds.

    Images are not decoded. connections: files at a time; a piece of each is in memory.
    RemoteError when the server cannot be reached.
    """
    files = {name: FileEntry(of["bytes"], of["sha256"]) for name, of in manifest["files"].items()}

    def problem(name: str) -> str | None:
        try:
            remote.check(name, files[name])
        except (DamageError, RefusedError) as error:
            return str(error)
        return None

    problems = []
    with (
        progress_bar("checksums", sum(entry.bytes for entry in files.values()), progress, unit="B") as advance,
        ThreadPoolExecutor(connections or FETCHERS) as pool,
    ):
        try:
            for entry, found in zip(files.values(), pool.map(problem, files), strict=True):
                problems += [] if found is None else [found]
                advance(entry.bytes)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # a command that is interrupted asks for no more files
    return problems
