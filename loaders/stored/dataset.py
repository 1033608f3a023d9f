"""A converted data set: a folder with a manifest, the labels, and each split's images in one or two formats.

The folder is made under another name and renamed when it is whole (`convert`): what opens is complete, whatever was
killed when.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlt.names import pick
from loaders.sources.messages import printable, readable_bytes
from loaders.sources.split import SPLITS
from loaders.stored.atomic_folder import MANIFEST
from loaders.stored.beton import Beton
from loaders.stored.damage import DamageError, read_arrays
from loaders.stored.identity import DatasetIdentity, content_sha256
from loaders.stored.manifest import CONTENTS, LABELS, MAKE, as_json, check_files, damaged, read_manifest, stamp
from loaders.stored.progress import progress_bar
from loaders.stored.tar_shards import TarShards

if TYPE_CHECKING:
    from fastlt.state import ClassCounts, ShotRanks

SMALL_BYTES = 1 << 28  # a data set of so many bytes is read in 0.2 s: its content is compared at every start


@dataclass(frozen=True)
class ConvertedDataset:
    """A complete converted data set on disk.

    root: its folder.
    class_names: C names in label order.
    manifest: the content of manifest.json.
    """

    root: Path
    class_names: tuple[str, ...]
    manifest: dict[str, Any]

    @classmethod
    def open(cls, root: Path | str) -> ConvertedDataset:
        """Open a folder; checks that its files are there and as long as the manifest says (contents: `verify`).

        Raises ValueError, with the command to run, for a folder that is no converted data set, DamageError for one that
        is not whole any more.
        """
        root = Path(root)
        try:
            manifest = read_manifest(root)
            check_files(root, manifest)
        except OSError as error:
            raise DamageError(f"{root} cannot be read: {error.strerror} ({error.filename})") from None
        return cls(root, tuple(map(printable, manifest["class_names"])), manifest)

    @property
    def place(self) -> str:
        """Where it is, as users call it."""
        return str(self.root)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def _labels(self) -> dict[str, np.ndarray]:
        try:
            labels = read_arrays(self.root / LABELS, SPLITS)
        except DamageError as error:
            raise damaged(self.root, f"{LABELS} cannot be read ({error})") from None
        for split, of_split in labels.items():
            counts = self.manifest["splits"][split]["class_counts"]
            if of_split.dtype != np.int64 or of_split.ndim != 1 or of_split.min(initial=0) < 0:
                raise damaged(self.root, f"the labels of {split!r} in {LABELS} are no class numbers")
            if np.bincount(of_split, minlength=self.num_classes).tolist() != counts:
                raise damaged(self.root, f"{LABELS} and {MANIFEST} disagree on the class counts of {split!r}")
        return labels

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, int64 (N,)."""
        return pick("split", split, self._labels)

    def class_counts(self, shots: tuple[int, int] | ShotRanks = (100, 20)) -> ClassCounts:
        """Training images per class; `shots` say which are many- and few-shot (`fastlt.state.ClassCounts`)."""
        # Lazily: it imports torch, which a conversion's usage error must not wait for.
        from fastlt.state import ClassCounts

        counts = np.bincount(self.labels("train"), minlength=self.num_classes).astype(np.int64)
        return ClassCounts(counts, self.class_names, shots)

    def beton(self, split: str) -> Path:
        """The FFCV file of a split; sample i has label `labels(split)[i]`."""
        pick("split", split, self.manifest["splits"])
        self._require("ffcv", "FFCV")
        return split_file(self.root, split, "ffcv")

    def shards(self, split: str) -> Path:
        """The index of a split's shards, the DALI format; sample i has label `labels(split)[i]`."""
        pick("split", split, self.manifest["splits"])
        self._require("dali", "DALI's shards")
        return split_file(self.root, split, "dali")

    def stored(self, split: str, kind: str) -> Beton | TarShards:
        """The images of a split in the format `kind`, one of FORMATS; ValueError when it lacks that.

        DamageError when the file is not whole, or says something else of its images than the manifest.
        """
        opened = self._open(split, kind)
        described = self.manifest["splits"][split]
        if len(opened) != described["count"]:
            raise damaged(self.root, f"{opened.path.name} holds {len(opened):,} images, not {described['count']:,}")
        sizes = np.stack([opened.heights, opened.widths], axis=1)
        if [sizes.min(axis=0).tolist(), sizes.max(axis=0).tolist()] != [
            described["image_size"]["min"],
            described["image_size"]["max"],
        ]:
            raise damaged(self.root, f"the image sizes in {opened.path.name} and the manifest disagree")
        return opened

    def _open(self, split: str, kind: str) -> Beton | TarShards:
        return open_split(self.shards(split) if kind == "dali" else self.beton(split))

    @property
    def formats(self) -> tuple[str, ...]:
        """Which of FORMATS it holds."""
        return tuple(self.manifest["formats"])

    def stamps(self) -> dict[str, list[int]]:
        """The `stamp` of every file, by its path in the folder."""
        return {name: stamp(self.root / name) for name in self.manifest["files"]}

    def identity(
        self,
        known: DatasetIdentity | None = None,
        stamps: Mapping[str, Sequence[int]] | None = None,
        *,
        progress: bool = True,
        say: Callable[[str], object] = lambda text: None,
    ) -> DatasetIdentity:
        """Which images this is, with the content that the files hold now.

        A large data set is not read when its files have the stamps with which they were written, or `stamps`, with
        which they held what `known` says. `say` is told when it is read.
        DamageError when the files hold other images than were converted.
        """
        contents = self._unread_contents(known, stamps)
        if contents is None:
            contents = self._read_contents(progress, say)
            for kind, of_kind in self.manifest.get(CONTENTS, contents).items():
                wrong = [split for split in SPLITS if contents[kind][split] != of_kind[split]]
                if wrong:
                    what = f"{' and '.join(wrong)} (format {kind})"
                    raise damaged(self.root, f"the images or labels of {what} are not those that were converted")
        return DatasetIdentity.of(self.class_names, self._labels, contents)

    def recorded_identity(self) -> DatasetIdentity | None:
        """Which images this is by the manifest alone; None where an early version has written it."""
        contents = self.manifest.get(CONTENTS)
        return None if contents is None else DatasetIdentity.of(self.class_names, self._labels, contents)

    def _unread_contents(
        self, known: DatasetIdentity | None, stamps: Mapping[str, Sequence[int]] | None
    ) -> Mapping[str, Mapping[str, str]] | None:
        """The content by the stamps of the files; None where it has to be read."""
        files = self.manifest["files"]
        if sum(file["bytes"] for file in files.values()) <= SMALL_BYTES:
            return None
        now = self.stamps()
        if CONTENTS in self.manifest and now == {n: [f["bytes"], f.get("mtime_ns")] for n, f in files.items()}:
            return self.manifest[CONTENTS]
        if known is not None and stamps is not None and now == {name: list(of) for name, of in stamps.items()}:
            return known.contents
        return None

    def _read_contents(self, progress: bool, say: Callable[[str], object]) -> dict[str, dict[str, str]]:
        total = sum(file["bytes"] for file in self.manifest["files"].values())
        large = total > SMALL_BYTES
        if large:
            say(f"{self.root}: {readable_bytes(total)} are read once, to know which images these are")
        count = sum(self.manifest["splits"][split]["count"] for split in SPLITS) * len(self.formats)
        with progress_bar("checksums", count, progress and large) as advance:
            return {
                kind: {split: self._content_sha256(split, kind, advance) for split in SPLITS} for kind in self.formats
            }

    def _content_sha256(self, split: str, kind: str, advance: Callable[[int], object]) -> str:
        stored = self.stored(split, kind)
        return content_sha256(stored, stored.encoded, advance)

    def matches(self, request: Mapping[str, Any]) -> bool:
        """Whether this is what `convert` would make of `request`."""
        return not self.differences(request)

    def differences(self, request: Mapping[str, Any]) -> list[str]:
        """In what it is not what `convert` would make of `request`, one line each."""
        made, wanted = self.manifest["request"], as_json(request)
        keys = [*wanted, *(key for key in made if key not in wanted)]
        return [
            f"{key} is {made.get(key)!r}, not {wanted.get(key)!r}" for key in keys if made.get(key) != wanted.get(key)
        ]

    def _require(self, kind: str, what: str) -> None:
        if kind not in self.formats:
            make = f"{MAKE.format(folder=self.root)} --format both --overwrite"
            raise ValueError(f"{self.root} was not converted to {what}: make it with `{make}`")


def split_file(root: Path, split: str, kind: str) -> Path:
    """The file by which a split in the format `kind` is opened."""
    return root / "dali" / f"{split}.npz" if kind == "dali" else root / f"{split}.beton"


def open_split(path: Path) -> Beton | TarShards:
    """The stored images of a `split_file`; DamageError when it is not whole."""
    return TarShards(path) if path.suffix == ".npz" else Beton(path)
