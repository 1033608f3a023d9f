"""Makes the pieces of a conversion that are missing, and of all of them the files of a split."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from loaders.cores import available_cores
from loaders.sources.split import Split
from loaders.stored.dali_format import ShardWriter, shard_size, write_indices
from loaders.stored.encode import encode, stored_sizes
from loaders.stored.ffcv_format import BetonEnd, FfcvOptions, write_tables
from loaders.stored.forked_workers import STUCK_S, Advance, image_done, map_chunks
from loaders.stored.image_check import BadImage, check_image
from loaders.stored.pieces import ROW, Group, Piece, PieceStore, Table, take_over, tar_path
from loaders.stored.tar_shards import shard_path

PIECE_IMAGES = 64  # without shards; few enough that little is lost, and that all cores end together
PIECES_A_CORE = 4  # at least, where there are few images
Todo = tuple[str, np.ndarray, "int | None"]  # a piece that is to be made: group, positions, number of its shard
HELD_BYTES = 1 << 24  # of images that a process holds before it writes them


class SourceError(Exception):
    """A source failed, and not because an image is damaged."""


@dataclass(frozen=True)
class _Job:
    """What the processes need to make the pieces `todo`; ends: of the .beton files, by group."""

    store: PieceStore
    groups: Mapping[str, Group]
    tables: Mapping[str, Table]
    ends: Mapping[str, BetonEnd]
    todo: Sequence[Todo]

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each piece begins when all its images are numbered, int64 (pieces + 1,)."""
        return np.cumsum([0, *(len(positions) for _, positions, _ in self.todo)])

    @cached_property
    def first_number(self) -> int:
        """The number of the first piece; the others follow."""
        return 1 + max((int(path.name.split(".")[0]) for path in self.store.pieces.iterdir()), default=-1)


def store_images(
    store: PieceStore,
    groups: Mapping[str, Group],
    *,
    advance: Advance = lambda n: None,
    taken: Callable[[int, int], object] = lambda count, lost: None,
    timeout_s: float = STUCK_S,
) -> dict[str, Table]:
    """Check and store the images of the groups that no piece has yet; what is known of all of them.

    advance: called with the number of images done since the last call.
    taken: called once with the number of images that are taken over, and of those in pieces that do not serve.
    timeout_s: processes that finish no image for so long are ended.
    Raises ValueError when a process dies or all are stuck, OSError when the disk is full.
    """
    tables, ends_of_data, lost = take_over(store, groups)
    taken(sum(int(table.done.sum()) for table in tables.values()), lost)
    ends = {}
    for name, group in groups.items():
        if group.stored and "ffcv" in store.formats:
            path = store.converted / f"{name}.beton"
            ends[name] = BetonEnd.open(path, len(group.split), ends_of_data[name])
    todo = list(_missing(store, groups, tables))
    _write_pieces(_Job(store, groups, tables, ends, todo), advance, timeout_s)
    return tables


def _missing(store: PieceStore, groups: Mapping[str, Group], tables: Mapping[str, Table]) -> Iterator[Todo]:
    """The pieces that are to be made of images that are not done.

    With shards, a piece is a shard, which then need not be copied, or a part of one where there are too few of them to
    keep all cores busy.
    """
    cores = store.options.num_workers or available_cores()
    missing = {name: np.flatnonzero(~table.done) for name, table in tables.items()}
    most = max(1, -(-sum(map(len, missing.values())) // (PIECES_A_CORE * cores)))
    in_shards = {name: _in_shards(store, group, missing[name]) for name, group in groups.items()}
    if sum(number is not None for of_group in in_shards.values() for number, _ in of_group) >= 2 * cores:
        most_of_shard = max(map(len, missing.values()))
    else:
        most_of_shard = most
    for name, of_group in in_shards.items():
        for number, positions in of_group:
            size = min(most, PIECE_IMAGES) if number is None else most_of_shard
            for start in range(0, len(positions), size):
                yield name, positions[start : start + size], number


def _in_shards(store: PieceStore, group: Group, positions: np.ndarray) -> list[tuple[int | None, np.ndarray]]:
    """Positions, int64 (K,), by the number of their shard; None for those that go into none."""
    if not group.stored or "dali" not in store.formats:
        return [(None, positions)]
    of_shard = positions // shard_size(len(group.split), store.shard_images)
    return [(number, positions[of_shard == number]) for number in np.unique(of_shard).tolist()]


def arrange_shards(
    store: PieceStore,
    groups: Mapping[str, Group],
    tables: Mapping[str, Table],
    *,
    timeout_s: float = STUCK_S,
) -> None:
    """Copy images, all good and stored, into other shards where these are not as they have to be.

    They are, unless images were left out, or the source has changed since an interruption.
    """
    before, right = set(), set()
    for piece in store.read():
        if piece.group in groups:
            before.add(piece.number)
            if _is_shard(store, piece, groups[piece.group], tables[piece.group]):
                right.add((piece.group, piece.shard))
    todo = []
    for name, group in groups.items():
        for number, positions in _in_shards(store, group, np.arange(len(group.split))):
            if (name, number) not in right:
                todo.append((name, positions, number))
    _write_pieces(_Job(store, groups, tables, {}, todo), lambda n: None, timeout_s)
    used = {number for name in groups for number in np.unique(tables[name].rows["piece"]).tolist()}
    store.drop(sorted(before - used))


def _is_shard(store: PieceStore, piece: Piece, group: Group, table: Table) -> bool:
    """Whether a piece is a shard as it has to be: its images, in order and under their labels, and they are its."""
    if piece.shard is None:
        return False
    size, labels = shard_size(len(group.split), store.shard_images), group.split.labels
    positions = np.arange(piece.shard * size, min((piece.shard + 1) * size, len(labels)))
    if not np.array_equal(piece.positions, positions) or piece.labels != labels[positions].tolist():
        return False
    return bool((table.rows["piece"][positions] == piece.number).all()) and piece.in_place(group)


def _write_pieces(job: _Job, advance: Advance, timeout_s: float) -> None:
    """Make the pieces of a job, and enter them into its tables."""
    from loaders.stored.ffcv_kernels import kernels  # lazily: usage errors must not wait for torch and FFCV

    if job.todo:
        kernels()  # here, and not in each process
        _ = job.first_number  # before there is another piece
        chunks = [range(int(start), int(stop)) for start, stop in pairwise(job.starts)]
        workers = job.store.options.num_workers
        done = map_chunks(_store_piece, job, chunks, num_workers=workers, advance=advance, timeout_s=timeout_s)
        try:
            with closing(done):  # however it is left, no process goes on
                for chunk, (rows, reasons) in done:
                    index = int(np.searchsorted(job.starts, chunk.start))
                    name, positions, _ = job.todo[index]
                    job.tables[name].fill(positions, rows, reasons)
                    job.store.compared.add(job.first_number + index)
        except SourceError as error:
            raise ValueError(str(error)) from error


def _store_piece(job: _Job, chunk: range) -> tuple[np.ndarray, dict[int, str]]:
    """Check and write the images of a piece, and its record; a row of each, and why some are bad."""
    import cv2  # lazily, as above

    cv2.setNumThreads(0)  # its threads do not survive the fork that made this process
    index = int(np.searchsorted(job.starts, chunk.start))
    name, positions, shard = job.todo[index]
    writer = _PieceWriter(job, name, positions, shard, job.first_number + index)
    return writer.write()


class _PieceWriter:
    """Writes one piece."""

    def __init__(self, job: _Job, name: str, positions: np.ndarray, shard: int | None, number: int) -> None:
        self._job, self._name, self._positions, self._shard, self._number = job, name, positions, shard, number
        self._group, self._table, self._store = job.groups[name], job.tables[name], job.store
        self._rows = np.zeros(len(positions), dtype=ROW)
        self._rows["piece"] = number
        self._reasons: dict[int, str] = {}
        self._beton_sha256 = hashlib.sha256()
        self._held: list[tuple[int, bytes | memoryview]] = []
        self._held_bytes = 0

    def write(self) -> tuple[np.ndarray, dict[int, str]]:
        if self._shard is None:
            self._write_images(None)
            shard_sha256 = hashlib.sha256()
        else:
            with tar_path(self._store.pieces, self._number).open("wb") as file:
                tar = ShardWriter(file)
                self._write_images(tar)
                tar.end()
            shard_sha256 = tar.sha256
        split = self._group.split
        Piece(
            self._number,
            self._name,
            self._positions,
            [self._group.name(i) for i in self._positions.tolist()],
            split.labels[self._positions].tolist(),
            self._rows,
            self._reasons,
            self._shard,
            self._beton_sha256.hexdigest(),
            shard_sha256.hexdigest(),
        ).write(self._store.pieces)
        return self._rows, self._reasons

    def _write_images(self, tar: ShardWriter | None) -> None:
        for j, i in enumerate(self._positions.tolist()):
            if self._table.done[i]:
                self._copy(j, i, tar)
            else:
                try:
                    self._convert(j, i, tar)
                except ValueError as error:
                    self._reasons[j] = str(error)
                image_done()
        self._flush()

    def _convert(self, j: int, i: int, tar: ShardWriter | None) -> None:
        """Check image i, and write it; ValueError with the reason when it cannot be converted."""
        row, split = self._rows[j : j + 1], self._group.split
        try:
            row["stamp_0"], row["stamp_1"] = split.stamp(i)  # before it is read
            if not self._group.stored:
                (row["height"], row["width"]), row["key"] = check_image(split, i)
                return
            image = encode(split, i, self._store.options, self._store.formats)
        except ValueError:
            raise
        except Exception as error:  # not the image's fault
            raise SourceError(f"{split.name(i)}: {error}") from error
        (row["height"], row["width"]), row["key"] = image.size, image.key
        row["kept"], row["is_jpeg"] = image.kept, image.is_jpeg
        if "ffcv" in self._store.formats:
            self._beton_sha256.update(image.beton)
            self._held.append((j, image.beton))
            self._held_bytes += len(image.beton)
            if self._held_bytes >= HELD_BYTES:
                self._flush()
        if tar is not None:
            row["shard_at"], row["shard_bytes"] = tar.add(i, image.file, int(split.labels[i])), len(image.file)

    def _copy(self, j: int, i: int, tar: ShardWriter | None) -> None:
        """Take image i over from the piece that has it."""
        before = self._table.rows[i]
        self._rows[j] = before
        self._rows["piece"][j] = self._number
        if i in self._table.reasons:
            self._reasons[j] = self._table.reasons[i]
            return
        if before["beton_bytes"]:
            with (self._store.converted / f"{self._name}.beton").open("rb") as file:
                self._beton_sha256.update(os.pread(file.fileno(), int(before["beton_bytes"]), int(before["beton_at"])))
        if tar is not None:
            with tar_path(self._store.pieces, int(before["piece"])).open("rb") as file:
                data = os.pread(file.fileno(), int(before["shard_bytes"]), int(before["shard_at"]))
            self._rows["shard_at"][j] = tar.add(i, data, int(self._group.split.labels[i]))

    def _flush(self) -> None:
        if self._held:
            numbers, images = zip(*self._held, strict=True)
            self._rows["beton_at"][list(numbers)] = self._job.ends[self._name].append(images)
            self._rows["beton_bytes"][list(numbers)] = [len(image) for image in images]
            self._held, self._held_bytes = [], 0


def finish_split(store: PieceStore, name: str, group: Group, table: Table) -> None:
    """Write the tables and indices of a split whose images are all good and stored; its shards get their names."""
    labels, rows = group.split.labels, table.rows
    assert table.done.all(), name
    assert not table.reasons, name
    sizes = stored_sizes(table.sizes, store.options.max_resolution)
    if "ffcv" in store.formats:
        path = store.converted / f"{name}.beton"
        write_tables(path, labels, sizes, rows["is_jpeg"], rows["beton_at"], rows["beton_bytes"])
    if "dali" in store.formats:
        path, size = store.converted / "dali" / f"{name}.npz", shard_size(len(labels), store.shard_images)
        path.parent.mkdir(exist_ok=True)
        for number, start in enumerate(range(0, len(labels), size)):
            (piece,) = np.unique(rows["piece"][start : start + size]).tolist()
            os.replace(tar_path(store.pieces, piece), shard_path(path, number))
        is_jpeg = rows["kept"] | (store.options.mode == "jpg")
        write_indices(path, labels, sizes, is_jpeg, rows["shard_at"], rows["shard_bytes"], size)


def write_split(
    folder: Path,
    name: str,
    split: Split,
    options: FfcvOptions,
    formats: Sequence[str],
    *,
    advance: Advance = lambda n: None,
    shard_images: int | None = None,
    timeout_s: float = STUCK_S,
) -> list[BadImage]:
    """Write the images of one split that can be decoded to `folder`, as NAME.beton, dali/NAME.npz and its shards.

    The bad ones are returned; sample i is the i-th good image. Whole or not at all. Raises as `store_images`, and
    ValueError when no image is good.
    """
    work = folder / f"{name}.partial"
    work.mkdir(parents=True)
    try:
        store = PieceStore(work, options, formats, {}, shard_images)
        store.begin()
        groups = {name: Group(split)}
        tables = store_images(store, groups, advance=advance, timeout_s=timeout_s)
        check = tables[name].check(split)
        if not len(check.good):
            raise ValueError(f"{name}: none of the {len(split)} images can be decoded")
        if check.bad:
            groups = {name: Group(split.subset(check.good))}
            tables = store_images(store, groups, timeout_s=timeout_s)
        if "dali" in formats:
            arrange_shards(store, groups, tables, timeout_s=timeout_s)
        finish_split(store, name, groups[name], tables[name])
        for path in sorted(store.converted.rglob("*.*")):
            target = folder / path.relative_to(store.converted)
            target.parent.mkdir(exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return list(check.bad)
