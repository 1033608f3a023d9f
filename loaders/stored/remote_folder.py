"""Files of a folder on a server or in an object store, fetched through fsspec.

A server that does not answer is asked again, with longer and longer pauses, and so is one that gives other bytes than
it should. Credentials are those that fsspec's file systems find in their environment, and so are all other options.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from loaders.stored.damage import DamageError, RefusedError, RemoteError
from loaders.stored.manifest import file_sha256

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PATIENCE_S = 120.0  # since the first answer that was none, after which the server is not asked again
PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between two tries; each pause is twice the one before
STALL_S = 30.0  # without a byte, after which a connection is taken to be dead
WRONG_TRIES = 3  # of a file that has come whole and is another one than it should be
PIECE_BYTES = 1 << 23  # of a file that is read without a copy
TELL_S = 5.0  # between two lines that say that a server is asked again
# What to install for a protocol, where it is not there.
PACKAGES = {
    **dict.fromkeys(("http", "https"), "fastlt[stream]"),
    **dict.fromkeys(("s3", "s3a"), "fastlt[s3]"),
    **dict.fromkeys(("gs", "gcs"), "fastlt[gcs]"),
}
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # of the disk that is written to
# botocore's errors of a user's configuration; its others are of a connection.
MISCONFIGURED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "InvalidConfigError")
ADVICE = (
    "data.converted is the URL of a folder that `fastlt convert --format dali` wrote, with all its files, and which "
    "may be read from here"
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class FileEntry:
    """What a manifest says of a file: its length and checksum."""

    bytes: int
    sha256: str


class _WrongContentError(Exception):
    """A file came, and it is not the one that it should be."""


def is_url(place: str | None) -> bool:
    """Whether the word for a data set names a remote one, `https://…`, and not a folder."""
    return place is not None and "://" in place


def check_url(url: str) -> None:
    """ValueError for a URL of an unknown kind, or one with a password in it."""
    from fsspec import available_protocols

    parts = urlsplit(url)
    if parts.scheme not in available_protocols():
        raise ValueError(
            f"{url} begins with {parts.scheme}://; allowed are https://, s3://, gs:// and others of fsspec"
        )
    if parts.password is not None:
        raise ValueError(
            f"the URL of {parts.hostname} holds a password, and would be kept in the run folder; give it to fsspec, "
            "for https:// in ~/.netrc"
        )


@dataclass(frozen=True)
class RemoteFolder:
    """A folder at a URL; picklable."""

    url: str

    def of(self, name: str) -> str:
        """The URL of a file in it."""
        return f"{self.url.rstrip('/')}/{name}"

    def read(self, name: str) -> bytes:
        """The content of a small file. RemoteError when the server does not give it."""
        content = self._asked(name, lambda: self._files().cat_file(self.of(name)))
        assert isinstance(content, bytes), type(content)
        return content

    def fetch(self, name: str, target: Path, entry: FileEntry) -> None:
        """Write a file to `target`, which then holds the bytes that `entry` describes.

        `target` may be removed and made anew meanwhile, by the library that fetches it.
        RemoteError when the server does not give it, DamageError when it gives another one again and again, OSError
        when `target` cannot be written to.
        """
        self._asked(name, lambda: self._fetch(name, target, entry), target)

    def check(self, name: str, entry: FileEntry) -> None:
        """Read a file, piece by piece, and compare it with `entry`; errors as `fetch`, and nothing is written."""
        self._asked(name, lambda: self._check(name, entry))

    def _fetch(self, name: str, target: Path, entry: FileEntry) -> None:
        self._files().get_file(self.of(name), str(target), callback=_at_most(entry.bytes))
        _compare(target.stat().st_size, lambda: file_sha256(target), entry)

    def _check(self, name: str, entry: FileEntry) -> None:
        size, digest = 0, hashlib.sha256()
        # In one stream from a web server, which may know no ranges.
        block = 0 if urlsplit(self.url).scheme in ("http", "https") else PIECE_BYTES
        with self._files().open(self.of(name), "rb", block_size=block) as file:
            while size <= entry.bytes and (piece := file.read(PIECE_BYTES)):
                assert isinstance(piece, bytes), type(piece)
                size += len(piece)
                digest.update(piece)
        _compare(size, digest.hexdigest, entry)

    def _files(self) -> AbstractFileSystem:
        return _file_system(self.url)

    def _asked(self, name: str, ask: Callable[[], Result], target: Path | None = None) -> Result:
        """What `ask` returns, asked again after a while where it fails; the OSError when `target` is what fails."""
        _check_installed(self.url)
        wrong, began = 0, None
        for tries, pause in enumerate(_pauses(), 1):
            try:
                return ask()
            except _WrongContentError as error:
                answer, wrong, began = str(error), wrong + 1, None  # it answers, however long that took
            except Exception as error:  # whatever a file system of fsspec and the libraries below it raise
                if isinstance(error, OSError) and _is_local(error, target):
                    raise
                answer = _answer(error)
                if _is_final(error):
                    raise RefusedError(f"{self.of(name)}: {answer}; {ADVICE}") from None
            if wrong >= WRONG_TRIES:
                raise DamageError(
                    f"{self.of(name)}: {answer}, {tries} times; it was changed on the server or is not uploaded whole: "
                    "put all files of one conversion there"
                )
            began = time.monotonic() if began is None else began
            waited = time.monotonic() - began
            if waited + pause > PATIENCE_S:
                raise RemoteError(
                    f"{self.of(name)}: {answer} ({tries} tries in {waited:.0f} s); is the server up, and can it be "
                    "reached from here? The same command goes on where it was stopped"
                )
            tell(f"fastlt: {self.of(name)}: {answer}; trying again in {pause:.0f} s")
            time.sleep(pause)
        raise AssertionError("pauses never end")


def _compare(size: int, sha256: Callable[[], str], entry: FileEntry) -> None:
    """_WrongContentError for a file that is another one than `entry` describes."""
    if size != entry.bytes:
        raise _WrongContentError(f"it has {size:,} bytes, its manifest says {entry.bytes:,}")
    if sha256() != entry.sha256:
        raise _WrongContentError("its sha256 is not what its manifest says")


def _pauses() -> Iterator[float]:
    pause = PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _answer(error: BaseException) -> str:
    """What a server said, or what became of the connection to it, in one line."""
    lines = str(error).splitlines()
    said = lines[0].rstrip(".") if lines and lines[0] else type(error).__name__
    said = re.sub(r"\?\S+", "", said)  # of a URL, whose query may hold a token
    by_store = _status_of_store(error) is not None
    if isinstance(error, FileNotFoundError):
        return f"there is no such file ({said})" if by_store else "there is no such file"
    if isinstance(error, PermissionError):
        return f"it may not be read ({said})" if by_store else "it may not be read"
    status, message = getattr(error, "status", None), getattr(error, "message", "")
    if isinstance(status, int) and status:
        return f"the server answers {status} {message}".rstrip()
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer for {STALL_S:.0f} s"
    return said


def _is_local(error: OSError, target: Path | None) -> bool:
    """Whether the disk that is written to has failed, and not the server."""
    if target is None or _status_of_store(error) is not None:
        return False
    return error.errno in LOCAL or str(error.filename) == str(target)


def _status_of_store(error: BaseException) -> int | None:
    """The status with which an object store answered, where a library has made a Python error of it."""
    response = getattr(error.__cause__, "response", None)  # of botocore's ClientError
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None


def _is_final(error: Exception) -> bool:
    """Whether the server has answered and would answer the same again: a mistake of the one who asks."""
    if isinstance(error, TimeoutError):
        return False  # S3 gives it a status of such mistakes
    status = _status_of_store(error) or getattr(error, "status", None) or getattr(error, "code", None)  # gcsfs: code
    if isinstance(status, int) and 300 <= status < 500:
        return status not in (408, 425, 429)
    return (
        isinstance(error, (FileNotFoundError, PermissionError))
        or type(error) is ValueError  # gcsfs: what it was configured with
        or type(error).__name__ in MISCONFIGURED
        or str(error).startswith("Forbidden")  # gcsfs: an OSError
    )


_told = -TELL_S


def tell(text: str) -> None:
    """A line for the person who watches; several files that fail together are told once."""
    global _told
    now = time.monotonic()
    if now - _told >= TELL_S:
        _told = now
        tqdm.write(text, file=sys.stderr)


def _at_most(size: int) -> Any:
    """What fsspec calls with the bytes that have come; ends a file that is longer than it should be."""
    from fsspec.callbacks import Callback

    class AtMost(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > size:
                raise _WrongContentError(f"it has more than the {size:,} bytes that its manifest says")

    return AtMost()


def _check_installed(url: str) -> None:
    """ValueError when a package for the file system of a URL is missing."""
    import fsspec

    protocol = urlsplit(url).scheme
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError:
        package = PACKAGES.get(protocol)
        how = f": pip install '{package}'" if package else ""
        raise ValueError(f"{url}: a package that reads {protocol}:// is not installed{how}") from None


@functools.lru_cache(maxsize=8)
def _file_system(url: str) -> AbstractFileSystem:
    """The file system of a URL, with what fsspec is configured with, and our limits of time where that has none."""
    import fsspec

    protocol = urlsplit(url).scheme
    return fsspec.filesystem(protocol, skip_instance_cache=True, **_settings(protocol))


def _settings(protocol: str) -> dict[str, Any]:
    """Options of a file system: no limit of time for a file, but for a silent connection.

    What fsspec is configured with goes before. A library that asks again by itself does so for less than five minutes.
    """
    from fsspec.config import conf

    if protocol in ("http", "https"):
        return _configured((protocol,), "client_kwargs", _session())
    if protocol in (names := ("gs", "gcs")):
        logging.getLogger("gcsfs").addHandler(logging.NullHandler())  # else each try leaves a traceback on the terminal
        return _configured(names, "session_kwargs", _session())
    if protocol in (names := ("s3", "s3a")):
        # Files in one stream, as from other servers, and not in ten parts of 50 MB at a time, in memory.
        one_stream = {} if any("max_concurrency" in conf.get(name, {}) for name in names) else {"max_concurrency": 1}
        return one_stream | _configured(names, "config_kwargs", {"retries": {"total_max_attempts": 1}})
    return {}


def _configured(protocols: tuple[str, ...], option: str, ours: dict[str, Any]) -> dict[str, Any]:
    """An option that is a dict, with what fsspec is configured with for any name of a protocol before ours."""
    from fsspec.config import conf

    for protocol in protocols:
        ours = {**ours, **conf.get(protocol, {}).get(option, {})}
    return {option: ours}


def _session() -> dict[str, Any]:
    """Of aiohttp's sessions."""
    import aiohttp

    return {"trust_env": True, "timeout": aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)}
