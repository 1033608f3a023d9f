"""Writing a split as an FFCV file (.beton): how images are stored, where they lie in the file, and its tables.

FFCV's own writer begins anew after every interruption and waits for ever when one of its workers dies. Here any number
of processes put images into one file, each at places of its own, and the tables are written last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fastlt.names import unknown
from loaders.stored.beton import ALLOCATION, FIELD, HEADER, INT_FIELD, JPEG, RAW, RGB_FIELD, SAMPLE, VERSION, Beton
from loaders.stored.forked_workers import shared_count

MODES = ("raw", "jpg", "proportion")
PAGE_BYTES = 1 << 23  # FFCV's default; a power of two
BLOCK_BYTES = 1 << 12


@dataclass(frozen=True)
class FfcvOptions:
    """How images are stored.

    mode: "raw" pixels, in shards PNG files; "jpg"; or "proportion", of .beton files alone: half of the images, as their
        names decide, as JPEG, the others raw. FFCV's "smart" is not offered: without a threshold it stores everything
        raw. A JPEG file of the source keeps its bytes where it serves (`encode.kept_jpeg`), in shards and with "jpg".
    max_resolution: longer sides are scaled down to this many pixels (area interpolation, aspect ratio kept).
    jpeg_quality: 1..100.
    num_workers: processes, None for one a core.
    """

    mode: str = "raw"
    max_resolution: int | None = None
    jpeg_quality: int = 90
    num_workers: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(unknown("mode", self.mode, MODES))
        if self.max_resolution is not None and self.max_resolution < 1:
            raise ValueError(f"max_resolution is {self.max_resolution}: it must be at least 1, or left out")
        if not 1 <= self.jpeg_quality <= 100:
            raise ValueError(f"jpeg_quality is {self.jpeg_quality}: it must be 1 to 100")
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"num_workers is {self.num_workers}: it must be at least 1")

    def parameters(self) -> dict:
        """What determines the stored bytes, for the manifest: all but the number of workers."""
        return {name: value for name, value in asdict(self).items() if name != "num_workers"}


def first_address(count: int) -> int:
    """Where the tables at the front of a file of `count` images end."""
    return HEADER.itemsize + 2 * FIELD.itemsize + count * SAMPLE.itemsize


def places(end: int, sizes: Sequence[int]) -> list[int]:
    """Where images of `sizes` bytes lie when they are put behind `end`, one after the other.

    FFCV reads a file by pages. No image lies on two: it is within one page of PAGE_BYTES, or of the next power of two
    where it is larger.
    """
    found = []
    for size in sizes:
        page = page_of(size)
        if end % page + size > page:
            end += -end % page
        found.append(end)
        end += size
    return found


def page_of(size: int) -> int:
    """The bytes of the smallest page that an image of `size` bytes fits into."""
    return max(PAGE_BYTES, 1 << (size - 1).bit_length())


class BetonEnd:
    """The end of a .beton file that several processes write to; made before they are forked."""

    def __init__(self, path: Path, end: int) -> None:
        self.path = path
        self._end = shared_count(end)

    @classmethod
    def open(cls, path: Path, count: int, end: int) -> BetonEnd:
        """Of a file, made where there is none, whose images end before `end`; what lies behind is cut off.

        count: images that the file is to hold, for which there is room at the front.
        """
        end = max(end, first_address(count) + -first_address(count) % BLOCK_BYTES)
        with path.open("ab") as file:
            file.truncate(end)
        return cls(path, end)

    def append(self, images: Sequence[bytes | memoryview]) -> list[int]:
        """Write images, one after the other; their places."""
        data = [memoryview(image).cast("B") for image in images]
        with self._end.get_lock():
            found = places(self._end.value, [len(image) for image in data])
            self._end.value = found[-1] + len(data[-1])
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            for place, image in zip(found, data, strict=True):
                while len(image):  # on a disk that becomes full the system takes a part
                    written = os.pwrite(descriptor, image, place)
                    place, image = place + written, image[written:]
        finally:
            os.close(descriptor)
        return found


def write_tables(
    path: Path, labels: np.ndarray, sizes: np.ndarray, is_jpeg: np.ndarray, offsets: np.ndarray, lengths: np.ndarray
) -> None:
    """Finish a .beton file whose images are in their places, in the order of the labels.

    labels, offsets, lengths: int64 (N,).  sizes: int64 (N, 2), (height, width).  is_jpeg: bool (N,).
    May be done again. Raises ValueError when the file then does not open.
    """
    end = int((offsets + lengths).max())
    header = np.zeros(1, dtype=HEADER)
    header["version"], header["num_fields"], header["num_samples"] = VERSION, 2, len(labels)
    header["page_size"], header["allocation_table"] = page_of(int(lengths.max())), end
    fields = np.zeros(2, dtype=FIELD)
    fields["type"], fields["name"] = (RGB_FIELD, INT_FIELD), (b"image", b"label")
    samples = np.zeros(len(labels), dtype=SAMPLE)
    samples["image"]["mode"] = np.where(is_jpeg, JPEG, RAW)
    samples["image"]["height"], samples["image"]["width"] = sizes.T
    samples["image"]["data_ptr"], samples["label"] = offsets, labels
    allocations = np.zeros(len(labels), dtype=ALLOCATION)
    allocations["sample"], allocations["data_ptr"], allocations["size"] = np.arange(len(labels)), offsets, lengths
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(allocations.tobytes())
        file.seek(0)
        file.write(header.tobytes() + fields.tobytes() + samples.tobytes())
    Beton(path)
