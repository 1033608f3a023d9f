"""Writing a split as WebDataset shards, the format of the DALI loader: plain tar files of JPEG and PNG images."""

from __future__ import annotations

import hashlib
import os
import tarfile
from io import BufferedWriter
from pathlib import Path

import numpy as np

from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.tar_shards import (
    BLOCK,
    COLUMNS,
    IDX_VERSION,
    JPEG_START,
    idx_line,
    member_names,
    padded,
    shard_path,
)

SHARD_IMAGES = 1024  # at least, but the last
MOST_SHARDS = 128  # a split: each one stays mapped while it is read, and a process may open about a thousand files
MODES = ("raw", "jpg")


def check_dali_options(options: FfcvOptions) -> None:
    """ValueError for storage options that only FFCV has."""
    if options.mode not in MODES:
        raise ValueError(f"mode {options.mode!r} is FFCV's own: the dali format takes {' or '.join(MODES)}")


def shard_size(count: int, asked: int | None = None) -> int:
    """Images a shard of a split of `count` images: as many as are asked for, or 1024, in 128 shards at most."""
    return max(SHARD_IMAGES, -(-count // MOST_SHARDS)) if asked is None else asked


class ShardWriter:
    """Writes a shard from front to back.

    sha256: of what has been written so far.
    """

    def __init__(self, file: BufferedWriter) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()

    def add(self, k: int, image: bytes, label: int) -> int:
        """Append sample k; where its image lies. Equal images under equal numbers and labels give equal shards."""
        image_name, label_name = member_names(k, image)
        place = self._add(image_name, image)
        self._add(label_name, str(label).encode())
        return place

    def end(self) -> None:
        """The two blocks of zeros that end a tar file."""
        self._write(bytes(2 * BLOCK))

    def _add(self, name: str, data: bytes) -> int:
        member = tarfile.TarInfo(name)  # always with the same owner and time
        member.size = len(data)
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        place = self._file.tell()
        self._write(data)
        self._write(bytes(padded(len(data)) - len(data)))
        return place

    def _write(self, data: bytes) -> None:
        self.sha256.update(data)
        self._file.write(data)


def write_indices(
    path: Path,
    labels: np.ndarray,
    sizes: np.ndarray,
    is_jpeg: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    shard_images: int,
) -> None:
    """Write DALI's index of each shard and `path`, the index of the split, last: without it, a split is unfinished.

    labels, offsets, lengths: int64 (N,).  sizes: int64 (N, 2), (height, width).  is_jpeg: bool (N,), False for PNG.
    """
    first = np.arange(0, len(labels), shard_images)
    for number, start in enumerate(first.tolist()):
        lines = [f"{IDX_VERSION} {min(shard_images, len(labels) - start)}"]
        for k in range(start, min(start + shard_images, len(labels))):
            names, offset, size = member_names(k, JPEG_START if is_jpeg[k] else b""), int(offsets[k]), int(lengths[k])
            label = names[1], offset + padded(size) + BLOCK, len(str(labels[k]))
            lines.append(idx_line((names[0], offset, size), label))
        shard_path(path, number).with_suffix(".idx").write_text("\n".join(lines) + "\n")
    columns = (first, offsets, lengths, sizes[:, 0], sizes[:, 1], labels)
    partial = path.with_name(path.stem + ".partial.npz")
    np.savez(partial, **dict(zip(COLUMNS, columns, strict=True)))
    os.replace(partial, path)
