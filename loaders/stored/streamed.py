"""A converted data set on a server: what is small is fetched before work starts, training shards when they are read."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from loaders.sources.messages import printable
from loaders.sources.split import SPLITS
from loaders.stored.atomic_folder import MANIFEST
from loaders.stored.beton import Beton
from loaders.stored.cached_folder import DATASET, PART, CachedFolder, readable
from loaders.stored.damage import DamageError, NoRoomError
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.identity import DatasetIdentity
from loaders.stored.manifest import CONTENTS, LABELS, SEAL, manifest_sha256, parse_manifest
from loaders.stored.mapped_file import map_file
from loaders.stored.remote_folder import FileEntry, RemoteFolder
from loaders.stored.tar_shards import TarShards, shard_path

STREAMED = "train"  # the split whose shards are fetched when they are read
OPEN_SHARDS = 32
MAKE = "make one with `fastlt convert SOURCE --format dali --out DIR`, and put all files of DIR there"


class StreamedShards(TarShards):
    """A split whose shards are fetched when an image of them is asked for, and may go when others are.

    open_shards: how many of them this process keeps open, and so in the cache, at most.
    Threads may ask at once. Raises, when an image is asked for, as `CachedFolder.hold`.
    """

    in_memory = False

    def __init__(self, path: Path | str, files: CachedFolder, open_shards: int = OPEN_SHARDS) -> None:
        self.files, self.open_shards = files, open_shards
        self._opened: OrderedDict[int, tuple[np.ndarray, BufferedReader]] = OrderedDict()
        self._opening = threading.Lock()
        super().__init__(path)

    def __reduce__(self) -> tuple:
        return StreamedShards, (self.path, self.files, self.open_shards)

    def name(self, number: int) -> str:
        """What the manifest calls a shard."""
        return f"dali/{shard_path(self.path, number).name}"

    def _open_shards(self) -> list[int]:
        names = [self.name(number) for number in range(len(self.first))]
        missing = next((name for name in names if name not in self.files.files), None)
        if missing is not None:
            raise DamageError(f"{self.files.remote.of(MANIFEST)} lacks {missing}: convert the data set again")
        return [self.files.files[name].bytes for name in names]

    def _shard(self, number: int) -> np.ndarray:
        with self._opening:
            if number in self._opened:
                self._opened.move_to_end(number)
                return self._opened[number][0]
        # Not under the lock: threads fetch different shards at once.
        file = self.files.hold(self.name(number))
        mapped = map_file(self.files.root / self.name(number))
        with self._opening:
            before = self._opened.pop(number, None)
            self._opened[number] = mapped, file
            closed = [] if before is None else [before]
            while len(self._opened) > self.open_shards:
                closed.append(self._opened.popitem(last=False)[1])
        for _, other in closed:
            other.close()  # what is still read of it stays mapped
        return mapped


@dataclass(frozen=True)
class StreamedDataset(ConvertedDataset):
    """A converted data set at a URL. root: of the local files, in the cache.

    Every file is compared with the manifest when it is fetched. The files that are fetched before work starts stay in
    the cache for as long as this object lives.
    """

    files: CachedFolder
    held: tuple[BufferedReader, ...]

    @classmethod
    def open_url(
        cls, url: str, cache: Path, limit_bytes: int, *, seal: str | None = None, progress: bool = False
    ) -> StreamedDataset:
        """Open a data set at a URL, and fetch all of it but the training images.

        cache: a folder for local files. limit_bytes: how large it may become, with those of other data sets.
        seal: the checksum of its manifest, where another process has opened it.
        ValueError when there is none, or no room for it; RemoteError when the server does not give it, DamageError when
        it gives other files than the manifest describes, or another manifest than that of `seal`.
        """
        remote = RemoteFolder(url)
        text, manifest = remote_manifest(remote)
        found = manifest_sha256(manifest)
        if seal is not None and seal != found:
            raise DamageError(f"{url} became another data set while the run began: give the same command again")
        if "dali" not in manifest["formats"] or CONTENTS not in manifest:
            raise ValueError(
                f"{url} cannot be read from a server: it was converted "
                + ("by an earlier version" if "dali" in manifest["formats"] else "to .beton files only")
                + f"; {MAKE}"
            )
        root = cache / f"{DATASET}{found[:16]}"
        _write_manifest(root, text)
        entries = {name: FileEntry(of["bytes"], of["sha256"]) for name, of in manifest["files"].items()}
        files = CachedFolder(root, remote, entries, limit_bytes)
        held = files.hold_all(_fetched_first(entries), progress)
        return cls(root, tuple(map(printable, manifest["class_names"])), manifest, files, tuple(held))

    @property
    def place(self) -> str:
        """Where it is, as users call it."""
        return self.files.remote.url

    @property
    def seal(self) -> str:
        """The checksum of its manifest."""
        return manifest_sha256(self.manifest)

    @property
    def formats(self) -> tuple[str, ...]:
        """That of its shards; other files stay on the server."""
        return ("dali",)

    def images_per_shard(self) -> float:
        """Of training shards, on average."""
        shards = sum(_is_shard(name, STREAMED) for name in self.files.files)
        return self.manifest["splits"][STREAMED]["count"] / max(1, shards)

    def check_room(self, shards: int) -> None:
        """NoRoomError when so many training shards at a time do not fit into the cache beside the other files."""
        sizes = sorted(entry.bytes for name, entry in self.files.files.items() if _is_shard(name, STREAMED))
        always = sum(self.files.files[name].bytes for name in _fetched_first(self.files.files))
        needed = always + sum(sizes[-shards:])
        if needed > self.files.limit_bytes:
            raise NoRoomError(
                f"data.stream.cache_gb is {self.files.limit_bytes / 1e9:g}, but {min(shards, len(sizes))} training "
                f"shards of {self.place} are in use at a time, and its other files take {readable(always)}: give "
                f"{needed / 1e9:.3g} or more, or a smaller data.stream.block or data.stream.parts"
            )

    def stamps(self) -> dict[str, list[int]]:
        """None: its files are compared with the manifest, which is read at every start."""
        return {}

    def identity(
        self,
        known: DatasetIdentity | None = None,
        stamps: Mapping[str, Sequence[int]] | None = None,
        *,
        progress: bool = True,
        say: Callable[[str], object] = lambda text: None,
    ) -> DatasetIdentity:
        """Which images this is, by its manifest. `known` is not needed."""
        return DatasetIdentity.of(self.class_names, self._labels, self.manifest[CONTENTS])

    def _open(self, split: str, kind: str) -> Beton | TarShards:
        if split == STREAMED and kind == "dali":
            return StreamedShards(self.shards(split), self.files)
        return super()._open(split, kind)


def remote_manifest(remote: RemoteFolder) -> tuple[bytes, dict[str, Any]]:
    """The manifest of a remote data set, as it lies there and read. Errors as `StreamedDataset.open_url`."""
    text = remote.read(MANIFEST)
    manifest = parse_manifest(text, remote.url, MAKE)
    found = manifest_sha256(manifest)
    if manifest.get(SEAL, found) != found:
        raise DamageError(f"{remote.of(MANIFEST)} is not what was written; it was edited or damaged")
    return text, manifest


def _fetched_first(files: Mapping[str, Any]) -> list[str]:
    """The names of the files that are fetched before work starts."""
    wanted = {LABELS, *(f"dali/{split}.npz" for split in SPLITS)}
    small = [split for split in SPLITS if split != STREAMED]
    return [name for name in files if name in wanted or any(_is_shard(name, split) for split in small)]


def _is_shard(name: str, split: str) -> bool:
    return name.startswith(f"dali/{split}-") and name.endswith(".tar")


def _write_manifest(root: Path, text: bytes) -> None:
    """NoRoomError when the cache cannot be written to."""
    path = root / MANIFEST
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            part = path.with_name(f"{MANIFEST}.{os.getpid()}{PART}")
            part.write_bytes(text)
            os.replace(part, path)
    except OSError as error:
        raise NoRoomError(
            f"{root.parent} cannot be written to ({error.strerror}): give another folder for the cache of remote data "
            "sets, data.stream.cache=DIR"
        ) from None
