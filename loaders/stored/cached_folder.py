"""The files of a remote data set on this machine's disk, as many as there is room for.

Processes share the cache, those of one run and of others:

    cache/.lock                       held while room is made
    cache/DATASET/manifest.json       DATASET is `fastlt-` and the manifest's checksum: another data set at the same URL
                                      has a folder of its own
    cache/DATASET/dali/NAME.tar       whole and checked; locked, shared, by each process that uses it
    cache/DATASET/dali/NAME.tar.SIZE.lock    locked by the process that fetches it
    cache/DATASET/dali/NAME.tar.part         what has come of it; libraries remove and replace it as they like
    cache/DATASET/dali/NAME.tar.failed       why it could not be fetched, for those who waited for that

The least recently used files make room for others, but none that is locked. Of a killed process the kernel releases the
locks. The time at which a file was used is its time of access, set here. Its time of change is made from its checksum:
one that has another was written to since it was checked, and is checked again.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path

from fastlt import file_lock
from loaders.stored.atomic_folder import LOCK
from loaders.stored.damage import NoRoomError, RemoteError
from loaders.stored.manifest import LABELS, file_sha256
from loaders.stored.progress import progress_bar
from loaders.stored.remote_folder import PATIENCE_S, FileEntry, RemoteFolder, tell

PART, FAILED = ".part", ".failed"
DATASET = "fastlt-"  # with 16 hexadecimal digits, the name of a folder of ours: nothing else in the cache is touched
POLL_S = 0.5  # between two looks at what another process does
STUCK_S = 300.0  # without a byte, after which another process is not waited for: longer than a server is asked again
FETCHERS = 4  # files at a time
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)
_counting = threading.Lock()


class _FullError(NoRoomError):
    """No room, until a process lets go of a file."""


@dataclass
class Figures:
    """What this process has fetched."""

    files: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class CachedFolder:
    """The local files of a remote data set; picklable, each process counts its own figures.

    root: DATASET's folder in the cache.  files: of the data set, by name.  limit_bytes: of the whole cache.
    """

    root: Path
    remote: RemoteFolder
    files: Mapping[str, FileEntry]
    limit_bytes: int
    figures: Figures = field(default_factory=Figures, compare=False)

    def hold(self, name: str, wait: bool = True) -> BufferedReader:
        """A file of the data set, open, whole and checked; it stays in the cache until it is closed.

        Fetched where it is absent, by one process: others wait for it. RemoteError and DamageError as
        `RemoteFolder.fetch`, NoRoomError when there is no room for it.
        wait: whether files in use are waited for, PATIENCE_S at most, when they leave no room.
        """
        entry, target, since = self.files[name], self.root / name, time.time()
        locked, part = target.with_name(f"{target.name}.{entry.bytes}{LOCK}"), _part(target)
        size, grown, full_since = -1, since, None
        while True:
            full = None
            try:
                held = self._present(target, entry)
                if held is not None:
                    return held
                lock = file_lock.open_locked(locked, POLL_S)
            except OSError as error:
                raise self._not_written(name, error) from None
            if lock is None:
                size, before = _size(part), size
                grown = grown if size == before else time.time()
                if time.time() - grown > STUCK_S:
                    raise RemoteError(
                        f"{self.remote.of(name)}: another process of this machine fetches it, and no byte has come for "
                        f"{STUCK_S:.0f} s: is it stopped?"
                    )
                continue
            try:
                if not target.exists():
                    _raise_failure(target, since)
                    self._fetch(name, target, part)
            except _FullError as error:
                full = error
            finally:
                locked.unlink(missing_ok=True)
                os.close(lock)
            if full is not None:  # waited for without the lock, which would keep room from others
                now = time.monotonic()
                if not wait or (full_since is not None and now - full_since > PATIENCE_S):
                    raise full
                if full_since is None:
                    full_since = now
                    tell(
                        f"fastlt: {self.root.parent}: {readable(self.limit_bytes)} are full of files in use; waiting "
                        f"until there is room for {target.name}"
                    )
                time.sleep(POLL_S)

    def hold_all(self, names: Iterable[str], progress: bool) -> list[BufferedReader]:
        """As `hold`, several at a time, with a progress bar for what is fetched."""
        names = list(names)
        missing = sum(self.files[name].bytes for name in names if not (self.root / name).exists())
        with (
            progress_bar("fetch", missing, progress and missing > 0, unit="B") as advance,
            ThreadPoolExecutor(FETCHERS) as pool,
        ):
            held = []
            for name, known in zip(names, pool.map(self._held_anew, names), strict=True):
                held.append(known[0])
                advance(self.files[name].bytes if known[1] else 0)
        return held

    def _held_anew(self, name: str) -> tuple[BufferedReader, bool]:
        """The file, and whether it was not there."""
        there = (self.root / name).exists()
        return self.hold(name, wait=False), not there

    def _present(self, target: Path, entry: FileEntry) -> BufferedReader | None:
        """The file with its lock, if it is there; one that was changed is removed."""
        try:
            file = target.open("rb")
        except (FileNotFoundError, NotADirectoryError):
            return None
        file_lock.take(file.fileno(), target, wait=True, shared=True)
        status = os.fstat(file.fileno())
        if not file_lock.is_at(file.fileno(), target):
            file.close()
            return None
        as_it_was = (status.st_size, status.st_mtime_ns) == (entry.bytes, _stamp(entry))
        if not as_it_was and (status.st_size != entry.bytes or file_sha256(target) != entry.sha256):
            log.warning("%s was changed in the cache: it is fetched again", target)
            target.unlink(missing_ok=True)
            file.close()
            return None
        with suppress(PermissionError):  # another user's: the kernel keeps its time of access
            os.utime(target, ns=(time.time_ns(), _stamp(entry)))
        return file

    def _fetch(self, name: str, target: Path, part: Path) -> None:
        """Fetch a file to `part`, which nobody else does meanwhile, and rename it."""
        entry, failed = self.files[name], target.with_name(target.name + FAILED)
        try:
            self._make_room(name)
            self.remote.fetch(name, part, entry)
            os.utime(part, ns=(time.time_ns(), _stamp(entry)))
            with part.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException as error:
            part.unlink(missing_ok=True)
            if isinstance(error, RemoteError):
                with suppress(OSError):
                    failed.write_text(str(error))
            if isinstance(error, OSError):
                raise self._not_written(name, error) from None
            raise
        failed.unlink(missing_ok=True)
        with _counting:
            self.figures.files += 1
            self.figures.bytes += entry.bytes

    def _not_written(self, name: str, error: OSError) -> Exception:
        """What to raise when a file of the cache cannot be written."""
        if error.errno in NO_SPACE:
            return self._disk_full(name)
        return NoRoomError(
            f"{self.root.parent} cannot be written to ({error.strerror or error}): give another folder for the cache "
            "of remote data sets, data.stream.cache=DIR"
        )

    def _disk_full(self, name: str) -> NoRoomError:
        free = shutil.disk_usage(self.root).free
        return NoRoomError(
            f"{self.root.parent}: its disk has {readable(free)} free, and {Path(name).name} has no room "
            f"({readable(self.files[name].bytes)}): make room, give a folder on another disk (data.stream.cache=DIR), "
            "or a smaller data.stream.cache_gb"
        )

    def _make_room(self, name: str) -> None:
        """Remove files until the cache keeps its limit and the disk has room for all that is being fetched.

        The file `name` is counted by its lock, which is there already.
        """
        cache = self.root.parent
        with _room_lock(cache):
            used, coming, files = 0, 0, []
            for path, status in _entries(cache):
                if path.suffix == LOCK and not _abandoned(path):
                    reserved = int(path.suffixes[-2][1:])
                    used += reserved
                    coming += reserved - min(reserved, _on_disk(_part(_of_lock(path))))
                elif path.suffix not in (LOCK, PART, FAILED):
                    used += status.st_size
                    files.append((status.st_atime_ns, status.st_size, path))
            over_limit, over_disk = used - self.limit_bytes, coming - shutil.disk_usage(cache).free
            for _, size, path in sorted(files):
                if max(over_limit, over_disk) <= 0:
                    return
                if _remove_unused(path):
                    over_limit, over_disk = over_limit - size, over_disk - size
            if over_limit > 0:
                raise _FullError(
                    f"{cache}: {readable(self.limit_bytes)} are full of files in use, and {Path(name).name} has no "
                    f"room ({readable(self.files[name].bytes)}): give a larger data.stream.cache_gb, of which runs "
                    "that share this cache need the sum, or a smaller data.stream.block or data.stream.parts"
                )
            if over_disk > 0:
                raise self._disk_full(name)


def default_cache() -> Path:
    """The folder of the cache where the user names none: below that of all caches of the user."""
    caches = os.environ.get("XDG_CACHE_HOME")
    return (Path(caches) if caches else Path.home() / ".cache") / "fastlt" / "shards"


def readable(num_bytes: int) -> str:
    """In GB or MB."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


@contextmanager
def _room_lock(cache: Path) -> Iterator[None]:
    path = cache / LOCK
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        file_lock.take(descriptor, path, wait=True)
        yield
    finally:
        os.close(descriptor)


def _entries(cache: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of all data sets in the cache, but their manifests; those that go meanwhile are passed over."""
    for folder in cache.glob(f"{DATASET}{'[0-9a-f]' * 16}"):
        for path in (*folder.glob(f"{LABELS}*"), *folder.glob("dali/*")):
            with suppress(FileNotFoundError):
                yield path, path.stat()


def _part(target: Path) -> Path:
    """Where a file is fetched to."""
    return target.with_name(target.name + PART)


def _of_lock(path: Path) -> Path:
    """The file that is fetched by the process that has `path` locked, NAME.SIZE.lock."""
    return path.with_suffix("").with_suffix("")


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _on_disk(path: Path) -> int:
    """Bytes that a file takes of its disk; 0 where there is none."""
    try:
        return 512 * path.stat().st_blocks
    except FileNotFoundError:
        return 0


def _abandoned(lock: Path) -> bool:
    """Whether nobody fetches the file of this lock any more; what has come of it is removed then."""
    return _remove_unused(lock, _part(_of_lock(lock)))


def _remove_unused(path: Path, *others: Path) -> bool:
    """Remove a file that no process has locked, and before it `others`; whether they are gone."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return True
    except OSError:
        return False  # another user's
    try:
        if not (file_lock.take(descriptor, path) and file_lock.is_at(descriptor, path)):
            return False
        for gone in (*others, path):
            gone.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _raise_failure(target: Path, since: float) -> None:
    """RemoteError for a file that another process has failed to fetch since a time."""
    failed = target.with_name(target.name + FAILED)
    with suppress(FileNotFoundError):
        if failed.stat().st_mtime >= since:
            raise RemoteError(failed.read_text())


def _stamp(entry: FileEntry) -> int:
    """The time of change of a file that was checked, in ns: whole seconds, which every file system keeps."""
    return int(entry.sha256[:7], 16) * 1_000_000_000
