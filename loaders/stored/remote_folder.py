"""Files of a folder on a server or in an object store, fetched through fsspec.

A server that does not answer is asked again, with longer and longer pauses, and so is one that gives other bytes than
it should. Credentials are those that fsspec's file systems find in their environment.
"""

from __future__ import annotations

import errno
import functools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from loaders.stored.damage import DamageError, RemoteError
from loaders.stored.manifest import file_sha256

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PATIENCE_S = 120.0  # since the first answer that was none, after which the server is not asked again
PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # between two tries; each pause is twice the one before
STALL_S = 30.0  # without a byte, after which a connection is taken to be dead
WRONG_TRIES = 3  # of a file that has come whole and is another one than it should be
TELL_S = 5.0  # between two lines that say that a server is asked again
# What to install for a protocol, where it is not there.
PACKAGES = {"http": "fastlt[stream]", "https": "fastlt[stream]", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # of the disk that is written to

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

        RemoteError when the server does not give it, DamageError when it gives another one again and again, OSError
        when `target` cannot be written to.
        """
        self._asked(name, lambda: self._fetch(name, target, entry))

    def _fetch(self, name: str, target: Path, entry: FileEntry) -> None:
        self._files().get_file(self.of(name), str(target), callback=_at_most(entry.bytes))
        size = target.stat().st_size
        if size != entry.bytes:
            raise _WrongContentError(f"it has {size:,} bytes, its manifest says {entry.bytes:,}")
        if file_sha256(target) != entry.sha256:
            raise _WrongContentError("its sha256 is not what its manifest says")

    def _files(self) -> AbstractFileSystem:
        return _file_system(self.url)

    def _asked(self, name: str, ask: Callable[[], Result]) -> Result:
        """What `ask` returns, asked again after a while where it fails."""
        wrong, began = 0, time.monotonic()
        for tries, pause in enumerate(_pauses(), 1):
            try:
                return ask()
            except (FileNotFoundError, PermissionError) as error:
                raise RemoteError(f"{self.of(name)}: {_answer(error)}; {self._advice(name)}") from None
            except _WrongContentError as error:
                answer, wrong = str(error), wrong + 1
            except Exception as error:  # whatever a file system of fsspec and the libraries below it raise
                if getattr(error, "errno", None) in LOCAL:
                    raise
                answer = _answer(error)
                if _is_final(error):
                    raise RemoteError(f"{self.of(name)}: {answer}; {self._advice(name)}") from None
            if wrong >= WRONG_TRIES:
                raise DamageError(
                    f"{self.of(name)}: {answer}, {tries} times; it was changed on the server or is not uploaded whole: "
                    "put all files of one conversion there"
                )
            waited = time.monotonic() - began
            if waited + pause > PATIENCE_S:
                raise RemoteError(
                    f"{self.of(name)}: {answer} ({tries} tries in {waited:.0f} s); is the server up, and can it be "
                    "reached from here? The same command goes on where it was stopped"
                )
            _tell(f"fastlt: {self.of(name)}: {answer}; trying again in {pause:.0f} s")
            time.sleep(pause)
        raise AssertionError("pauses never end")

    def _advice(self, name: str) -> str:
        return (
            "data.converted is the URL of a folder that `fastlt convert --format dali` wrote, with all its files, and "
            "which may be read from here"
        )


def _pauses() -> Iterator[float]:
    pause = PAUSE_S
    while True:
        yield pause
        pause = min(2 * pause, LONGEST_PAUSE_S)


def _answer(error: BaseException) -> str:
    """What a server said, or what became of the connection to it, in one line."""
    status, message = getattr(error, "status", None), getattr(error, "message", "")
    if isinstance(status, int) and status:
        return f"the server answers {status} {message}".rstrip()
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, PermissionError):
        return "it may not be read"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"no answer for {STALL_S:.0f} s"
    lines = str(error).splitlines()
    return lines[0] if lines and lines[0] else type(error).__name__


def _is_final(error: Exception) -> bool:
    """Whether the server has answered and would answer the same again: a mistake of the one who asks."""
    status = getattr(error, "status", None)
    return isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)


_told = -TELL_S


def _tell(text: str) -> None:
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


@functools.lru_cache(maxsize=8)
def _file_system(url: str) -> AbstractFileSystem:
    """The file system of a URL. ValueError when a package for it is missing."""
    import fsspec

    protocol = urlsplit(url).scheme
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        if protocol in ("http", "https"):
            options["client_kwargs"] = _http_settings(protocol)
        return fsspec.filesystem(protocol, **options)
    except ImportError:
        package = PACKAGES.get(protocol)
        how = f": pip install '{package}'" if package else ""
        raise ValueError(f"{url}: a package that reads {protocol}:// is not installed{how}") from None


def _http_settings(protocol: str) -> dict[str, Any]:
    """Of aiohttp's sessions: no limit of time for a file, but for a silent connection; fsspec's own go before."""
    import aiohttp
    from fsspec.config import conf

    configured = conf.get(protocol, {}).get("client_kwargs", {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL_S, sock_read=STALL_S)
    return {"trust_env": True, "timeout": timeout, **configured}
