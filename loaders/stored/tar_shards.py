"""Reading a split's WebDataset shards image by image: tar files whose members DALI, WebDataset and `tar` know, too.

A split is `NAME-00000.tar`, `NAME-00001.tar`, … of pairs `000000000.jpg` (or `.png`) and `000000000.cls`; beside each
tar the index file that DALI's own reader takes (`.idx`), and for all of them `NAME.npz`, written last: where each
image's bytes lie, and its size and label.
"""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np

from loaders.order.crop import common_shape
from loaders.stored.damage import DamageError, read_arrays
from loaders.stored.mapped_file import map_file

JPEG_START = b"\xff\xd8"
BLOCK = 512  # tar's unit: headers are one, data are padded to it
IDX_VERSION = "v1.2"  # of the index files that DALI's wds2idx writes
COLUMNS = ("first", "offset", "size", "height", "width", "label")


class TarShards:
    """One split's stored images and labels, memory-mapped; picklable, so that worker processes can open their own.

    path: the split's index, `DIR/NAME.npz`.
    labels: int64 (N,).  heights, widths: int64 (N,), of the stored images.  sizes: int64 (N,), bytes of their files.
    first: int64 (S,), the first image of each shard.  shard_of: int64 (N,), each image's shard.
    DamageError when a file is absent, of another layout or cut short.
    """

    in_memory = True

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        index = self._read_index()
        self.first, self._offsets, self.sizes = index["first"], index["offset"], index["size"]
        self.heights, self.widths, self.labels = index["height"], index["width"], index["label"]
        self._check_index(index)
        self.shard_of = np.searchsorted(self.first, np.arange(len(self)), side="right") - 1
        ends = np.array(self._open_shards())[self.shard_of]
        if (self._offsets > ends - self.sizes).any():
            raise self._unusable("a shard is cut short")

    def __reduce__(self) -> tuple:
        return TarShards, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(H, W) when all stored images have one size, else None."""
        return common_shape(self.heights, self.widths)

    @property
    def tars(self) -> list[Path]:
        """The shards, in order."""
        return [shard_path(self.path, number) for number in range(len(self.first))]

    def encoded(self, i: int) -> np.ndarray:
        """The JPEG or PNG file of image `i`, a read-only view uint8 (n,)."""
        start = self._offsets[i]
        return self._shard(int(self.shard_of[i]))[start : start + self.sizes[i]]

    def image(self, i: int) -> np.ndarray:
        """Image `i` as RGB uint8 (H, W, 3); DamageError naming it when it is damaged."""
        height, width = int(self.heights[i]), int(self.widths[i])
        encoded = self.encoded(i)
        try:
            return decode(encoded, height, width)
        except ValueError as error:
            tar = shard_path(self.path, int(self.shard_of[i]))
            raise DamageError(f"{tar}, image {i}: {error}; convert the data set again") from error

    def problems(self, shard: int) -> list[str]:
        """Where a shard and the two indices of it disagree, one line each; reads the tar file's headers and labels."""
        tar = shard_path(self.path, shard)
        first = int(self.first[shard])
        last = int(self.first[shard + 1]) if shard + 1 < len(self.first) else len(self)
        try:
            with tarfile.open(tar) as archive:
                found = [(m.name, m.offset_data, m.size, _label_text(archive, m)) for m in archive]
        except (tarfile.TarError, OSError) as error:
            return [f"{tar}: not a readable tar file ({error})"]
        expected, lines = [], [f"{IDX_VERSION} {last - first}"]
        for i in range(first, last):
            names, text = member_names(i, self.encoded(i)), str(self.labels[i]).encode()
            offset, size = int(self._offsets[i]), int(self.sizes[i])
            image, label = (names[0], offset, size), (names[1], offset + padded(size) + BLOCK, len(text))
            expected += [(*image, None), (*label, text)]
            lines.append(idx_line(image, label))
        problems = []
        if found != expected:
            problems.append(f"{tar}: its members are not what {self.path.name} says")
        if tar.with_suffix(".idx").read_text().splitlines() != lines:
            problems.append(f"{tar.with_suffix('.idx')}: DALI's index and {self.path.name} disagree")
        return problems

    def _read_index(self) -> dict[str, np.ndarray]:
        if not self.path.is_file():
            raise DamageError(f"{self.path} does not exist: convert the data set with --format dali")
        try:
            return read_arrays(self.path, COLUMNS)
        except DamageError as error:
            raise self._unusable(f"its index cannot be read ({error})") from None

    def _check_index(self, index: dict[str, np.ndarray]) -> None:
        """DamageError for an index that cannot be right; what is damaged in a file shows when it is decoded."""
        if any(column.dtype != np.int64 or column.ndim != 1 for column in index.values()):
            raise self._unusable("its index does not hold whole numbers")
        if not len(self.labels):
            raise self._unusable("it holds no images")
        if any(len(index[name]) != len(self) for name in COLUMNS[1:]):
            raise self._unusable("the columns of its index are not equally long")
        first = self.first
        if not len(first) or first[0] != 0 or (np.diff(first) < 1).any() or first[-1] >= len(self):
            raise self._unusable("its index does not say which shard holds an image")
        wrong = {
            "has a side of 0 pixels": (self.heights < 1) | (self.widths < 1),
            "lies outside of its shard": (self._offsets < BLOCK) | (self.sizes < 1),
            "has a negative label": self.labels < 0,
        }
        for what, where in wrong.items():
            if where.any():
                raise self._unusable(f"image {int(where.argmax())} {what}")

    def _open_shards(self) -> list[int]:
        """Make the shards ready to be read; returns the bytes of each. DamageError for one that is not there."""
        self._shards = [self._map(number) for number in range(len(self.first))]
        return [shard.size for shard in self._shards]

    def _shard(self, number: int) -> np.ndarray:
        """The bytes of a shard, uint8 (n,)."""
        return self._shards[number]

    def _map(self, number: int) -> np.ndarray:
        tar = shard_path(self.path, number)
        if not tar.is_file() or tar.stat().st_size == 0:
            raise self._unusable(f"{tar.name} is missing or empty")
        return map_file(tar)

    def _unusable(self, why: str) -> DamageError:
        return DamageError(f"{self.path} cannot be read as a converted split: {why}. Convert the data set again")


def _label_text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    file = archive.extractfile(member) if member.isfile() and member.name.endswith(".cls") else None
    return None if file is None else file.read()


def padded(size: int) -> int:
    """`size` rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def shard_path(index: Path, number: int) -> Path:
    """The tar file with this number that belongs to the split with index `NAME.npz`."""
    return index.with_name(f"{index.stem}-{number:05d}.tar")


def member_names(i: int, encoded: np.ndarray | bytes) -> tuple[str, str]:
    """What the shard calls image `i` and its label."""
    extension = "jpg" if is_jpeg(encoded) else "png"
    return f"{i:09d}.{extension}", f"{i:09d}.cls"


def idx_line(image: tuple[str, int, int], label: tuple[str, int, int]) -> str:
    """One sample's line in DALI's index file, from (member, offset of its data, size) of image and label."""
    return " ".join(f"{Path(name).suffix[1:]} {offset} {size} {name}" for name, offset, size in (image, label))


def is_jpeg(encoded: np.ndarray | bytes) -> bool:
    """Whether these bytes are a JPEG file; the shards hold nothing but JPEG and PNG."""
    return bytes(encoded[:2]) == JPEG_START


def decode(encoded: np.ndarray, height: int, width: int) -> np.ndarray:
    """RGB pixels uint8 (H, W, 3) of a JPEG or PNG file, uint8 (n,), with this project's one JPEG decoder.

    Raises ValueError when the bytes are damaged, cut short or of another size.
    """
    if is_jpeg(encoded):
        from loaders.stored.ffcv_kernels import (
            decode_jpeg,  # lazily: the writer shares this file, and its errors wait for no torch
        )

        return decode_jpeg(encoded, height, width)
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded.data), formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"))
    except UnidentifiedImageError:
        raise ValueError("damaged PNG data (no PNG file at all)") from None
    except Exception as error:  # Pillow's reader raises SyntaxError, struct.error, OSError, … on damaged files
        raise ValueError(f"damaged PNG data ({error or type(error).__name__})") from None
    if pixels.shape != (height, width, 3):
        raise ValueError(f"damaged PNG data ({pixels.shape[0]}x{pixels.shape[1]} that should be {height}x{width})")
    return pixels
