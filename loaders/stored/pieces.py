"""The images of a conversion, stored piece by piece: what was finished before an interruption is not done again.

A piece is some images of a split that one process has decoded and written. When all of them are written, a record of
the piece appears in `pieces/`: the name and stamp of each image, what the check has shown, where its data lie, and
checksums of these. Data of which no record tells do not count. So a conversion may be killed at any moment.
`piece_writer` makes the pieces that are missing.

    OUT.partial/conversion.json      how images are stored: pieces of another way do not fit
               /pieces/N.COUNT.json  the record of piece N; N.tar beside it is its shard, until it is renamed
               /converted/           what will be OUT: images go to their places in the .beton files at once
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loaders.cores import available_cores
from loaders.sources.split import SPLITS, UNREADABLE, EncodedImages, Split, called
from loaders.stored.atomic_folder import (
    CONVERTED,
    DESCRIPTION,
    LOCK,
    PIECES,
    OtherConversionError,
    write_durably,
)
from loaders.stored.ffcv_format import FfcvOptions, first_address
from loaders.stored.image_check import BadImage, ImageCheck
from loaders.stored.manifest import file_sha256
from loaders.stored.tar_shards import shard_path

# What a record has of an image. stamp: `Split.stamp`. height, width: of the source's image, 0 where it is bad. key: of
# its file. piece: whose shard has it. *_at, *_bytes: where its data lie in the .beton file and in the shard.
ROW = np.dtype(
    [
        *((name, "<i8") for name in ("stamp_0", "stamp_1", "height", "width")),
        *(("key", "<u8"), ("kept", "?"), ("is_jpeg", "?"), ("piece", "<i8")),
        *((name, "<i8") for name in ("beton_at", "beton_bytes", "shard_at", "shard_bytes")),
    ]
)


@dataclass(frozen=True)
class Group:
    """Images that belong together: those of a split, or those that are only checked, `stored` False."""

    split: Split
    stored: bool = True

    def name(self, i: int) -> str:
        """`called` of image i."""
        return called(self.split, i)


@dataclass
class Table:
    """What is known of the images of a group.

    rows: ROW (N,).  done: bool (N,).  reasons: why bad images cannot be converted.
    """

    rows: np.ndarray
    done: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)

    @classmethod
    def empty(cls, count: int) -> Table:
        return cls(np.zeros(count, dtype=ROW), np.zeros(count, dtype=bool))

    def fill(self, positions: np.ndarray, rows: np.ndarray, reasons: Mapping[int, str]) -> None:
        """Enter images; reasons: by their number among `positions`."""
        self.rows[positions], self.done[positions] = rows, True
        self.reasons |= {int(positions[j]): reason for j, reason in reasons.items()}

    def check(self, split: Split) -> ImageCheck:
        """What a check of the images has shown; all are done."""
        bad = tuple(BadImage(i, split.name(i), self.reasons[i]) for i in sorted(self.reasons))
        digests = np.where(self.rows["height"] > 0, self.rows["key"], 0).astype(np.uint64)
        return ImageCheck(self.sizes, bad, digests if isinstance(split, EncodedImages) else None)

    @property
    def sizes(self) -> np.ndarray:
        """int64 (N, 2), (height, width) of the source's images."""
        return np.stack([self.rows["height"], self.rows["width"]], axis=1)


@dataclass
class Piece:
    """What the record of a piece says of its images; `names` may be emptied when they have been found.

    positions: int64 (K,), of the images in their group at that time.  shard: of which shard they are a part, or all of
        it; None without shards.
    """

    number: int
    group: str
    positions: np.ndarray
    names: list[str]
    labels: list[int]
    rows: np.ndarray
    reasons: dict[int, str]
    shard: int | None
    beton_sha256: str
    shard_sha256: str

    @classmethod
    def read(cls, path: Path) -> Piece | None:
        """None for a file that is no whole record."""
        try:
            tree = json.loads(path.read_text())
            rows = np.array([tuple(row) for row in tree.pop("rows")], dtype=ROW)
            positions = np.array(tree.pop("positions"), dtype=np.int64)
            reasons = {int(j): str(reason) for j, reason in tree.pop("reasons").items()}
            piece = cls(rows=rows, positions=positions, reasons=reasons, **tree)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            return None
        return piece if len(piece.names) == len(rows) == len(positions) == len(piece.labels) else None

    def in_place(self, group: Group) -> bool:
        """Whether all its images are where they were in the group."""
        if not ((self.positions >= 0) & (self.positions < len(group.split))).all():
            return False
        return all(group.name(i) == name for i, name in zip(self.positions.tolist(), self.names, strict=True))

    @property
    def end(self) -> int:
        """Where its data end in the .beton file: also those of images that do not serve, which its checksum covers."""
        return int((self.rows["beton_at"] + self.rows["beton_bytes"]).max(initial=0))

    def write(self, folder: Path) -> None:
        """Put the record into `folder`, whole."""
        tree = {**vars(self), "positions": self.positions.tolist(), "rows": self.rows.tolist()}
        partial = folder / f"{self.number}.part"
        partial.write_text(json.dumps(tree))
        os.replace(partial, record_path(folder, self.number, len(self.rows)))


def record_path(folder: Path, number: int, images: int) -> Path:
    return folder / f"{number:09d}.{images}.json"


def tar_path(folder: Path, number: int) -> Path:
    return folder / f"{number:09d}.tar"


class PieceStore:
    """The finished pieces in the folder where a conversion works.

    options, formats: how the images are stored.
    description: what must be the same for pieces to be taken over.
    shard_images: images a shard, see `shard_size`; pieces of other shards are taken over.
    """

    def __init__(
        self,
        work: Path,
        options: FfcvOptions,
        formats: Sequence[str],
        description: Mapping[str, Any],
        shard_images: int | None = None,
    ) -> None:
        self.pieces, self.converted = work / PIECES, work / CONVERTED
        self.options, self.formats, self.shard_images = options, tuple(formats), shard_images
        self.compared: set[int] = set()  # pieces that this process has written or compared
        self._work, self._description = work, dict(description)

    def begin(self, *, restart: bool = False) -> None:
        """Take up what another conversion of this kind has left; nothing where there is none, or with `restart`.

        OtherConversionError when what is there is of another kind.
        """
        before = self._before()
        if before is not None and not restart and any(self.pieces.glob("*.json")):
            differences = [
                f"{key} is {before.get(key)!r}, not {value!r}"
                for key, value in self._description.items()
                if before.get(key) != value
            ]
            if differences:
                raise OtherConversionError(
                    f"{self._work} holds an unfinished conversion of another kind: {'; '.join(differences)}. Give its "
                    "command again to end it, another folder, or --restart to throw it away"
                )
            self._tidy()
        else:
            for entry in self._work.iterdir():
                if entry.name not in (LOCK, DESCRIPTION):
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        write_durably(self._work / DESCRIPTION, json.dumps(self._description))
        self.pieces.mkdir(exist_ok=True)
        self.converted.mkdir(exist_ok=True)

    def _before(self) -> dict[str, Any] | None:
        try:
            before = json.loads((self._work / DESCRIPTION).read_text())
        except (OSError, ValueError):
            return None
        return before if isinstance(before, dict) else None

    def _tidy(self) -> None:
        """Leave the records, their shards and the .beton files."""
        self.converted.mkdir(exist_ok=True)
        numbers = set()
        for path in self.pieces.glob("*.json"):
            number = int(path.name.split(".")[0])
            numbers.add(number)
            piece = Piece.read(path)
            if piece is None:
                numbers.remove(number)
            elif piece.shard is not None:
                renamed = shard_path(self.converted / "dali" / piece.group, piece.shard)
                if renamed.is_file() and not tar_path(self.pieces, number).exists():
                    renamed.rename(tar_path(self.pieces, number))
        for path in self.pieces.iterdir():
            if path.suffix == ".part" or int(path.name.split(".")[0]) not in numbers:
                path.unlink()
        for path in self.converted.iterdir():
            if path.name not in [f"{split}.beton" for split in SPLITS]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def read(self) -> Iterator[Piece]:
        """The records, the newest first."""
        for path in sorted(self.pieces.glob("*.json"), reverse=True):
            piece = Piece.read(path)
            if piece is not None:
                yield piece

    def intact(self, piece: Piece) -> bool:
        """Whether the data of a piece are what was written; reads all of them."""
        return piece.beton_sha256 == self._beton_sha256(piece) and piece.shard_sha256 == self._shard_sha256(piece)

    def _beton_sha256(self, piece: Piece) -> str:
        digest = hashlib.sha256()
        if piece.rows["beton_bytes"].any():
            with (self.converted / f"{piece.group}.beton").open("rb") as file:
                for at, size in piece.rows[["beton_at", "beton_bytes"]].tolist():
                    digest.update(os.pread(file.fileno(), size, at))
        return digest.hexdigest()

    def _shard_sha256(self, piece: Piece) -> str:
        if piece.shard is None:
            return hashlib.sha256().hexdigest()
        return file_sha256(tar_path(self.pieces, piece.number))

    def drop(self, numbers: Iterable[int]) -> None:
        """Delete pieces, their records first."""
        dropped = {f"{number:09d}" for number in numbers}
        for ending in ("json", "tar"):
            for path in [*self.pieces.glob(f"*.{ending}")] if dropped else []:
                if path.name.split(".")[0] in dropped:
                    path.unlink(missing_ok=True)


def take_over(store: PieceStore, groups: Mapping[str, Group]) -> tuple[dict[str, Table], dict[str, int], int]:
    """What the pieces have of the images of each group, and how many images of the pieces do not serve any more.

    Between them: by group, where the data of its pieces end in its .beton file.

    An image serves when it has the name and the stamp that it had then, in this split, and when its piece is as it was
    written. Pieces of which no image serves are deleted. What this process has written or compared is not read again.
    """
    tables = {name: Table.empty(len(group.split)) for name, group in groups.items()}
    pieces = _matched(store.read(), groups)

    def examine(piece: Piece) -> np.ndarray:
        group, positions = groups[piece.group], piece.positions
        serves = (positions >= 0) & _usable(piece, group, store.formats)
        if not serves.any():
            return serves
        stamps = [group.split.stamp(i) if i >= 0 else UNREADABLE for i in positions.tolist()]
        found = np.array(stamps, dtype=np.int64).reshape(-1, 2)
        serves &= (found[:, 0] == piece.rows["stamp_0"]) & (found[:, 1] == piece.rows["stamp_1"]) & (found[:, 1] >= 0)
        try:
            if not serves.any() or (piece.number not in store.compared and not store.intact(piece)):
                return np.zeros_like(serves)
        except OSError:
            return np.zeros_like(serves)
        store.compared.add(piece.number)
        return serves

    lost, useless = 0, []
    ends = dict.fromkeys(groups, 0)
    pool = ThreadPoolExecutor(available_cores())  # hashing and asking for stamps leave the interpreter's lock alone
    try:
        for piece, serves in zip(pieces, pool.map(examine, pieces), strict=True):
            table, positions = tables[piece.group], piece.positions
            lost += int((~serves).sum())
            serves &= ~table.done[positions]
            table.fill(
                positions[serves],
                piece.rows[serves],
                {int(serves[:j].sum()): reason for j, reason in piece.reasons.items() if serves[j]},
            )
            if serves.any():
                ends[piece.group] = max(ends[piece.group], piece.end)
            else:
                useless.append(piece.number)
    finally:
        pool.shutdown(cancel_futures=True)
    store.drop(useless)
    return tables, ends, lost


def _usable(piece: Piece, group: Group, formats: Sequence[str]) -> np.ndarray:
    """Which images of a piece have what is asked for, bool (K,): bad ones need no data."""
    rows = piece.rows
    usable = np.ones(len(rows), dtype=bool)
    if group.stored and "ffcv" in formats:  # the tables at the front of the file may have grown
        usable &= (rows["beton_bytes"] > 0) & (rows["beton_at"] >= first_address(len(group.split)))
    if group.stored and "dali" in formats:
        usable &= rows["shard_bytes"] > 0
    return usable | (rows["height"] == 0)


def _matched(pieces: Iterator[Piece], groups: Mapping[str, Group]) -> list[Piece]:
    """The pieces of the groups, with the positions where their images are now, -1 for those that are not there."""
    found, moved = [], []
    free = {name: np.ones(len(group.split), dtype=bool) for name, group in groups.items()}
    for piece in pieces:
        if piece.group not in groups:
            continue
        found.append(piece)
        if piece.in_place(groups[piece.group]):
            free[piece.group][piece.positions] = False
            piece.names.clear()  # of millions of images they would take gigabytes
        else:
            moved.append(piece)
    positions: dict[str, dict[str, list[int]]] = {}
    for piece in moved:
        if piece.group not in positions:
            of_name = positions[piece.group] = defaultdict(list)
            for i in np.flatnonzero(free[piece.group])[::-1].tolist():
                of_name[groups[piece.group].name(i)].append(i)
        of_name = positions[piece.group]
        now = [of_name[name].pop() if of_name.get(name) else -1 for name in piece.names]
        piece.positions, piece.names = np.array(now, dtype=np.int64), []
    return found
