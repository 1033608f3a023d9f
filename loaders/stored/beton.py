"""Reading an FFCV file (.beton) image by image, without FFCV's loader.

Layout: header, one descriptor a field, one metadata record a sample, pages of data, and at the end the allocation table
that says how many bytes lie at each address. Only the files this project writes are read: fields "image" (RGB) and
"label" (int).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.order.crop import common_shape
from loaders.stored.damage import DamageError
from loaders.stored.ffcv_kernels import decode_jpeg
from loaders.stored.mapped_file import map_file

VERSION = 2
JPEG, RAW = 0, 1
RGB_FIELD, INT_FIELD = 2, 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("allocation_table", "<u8"),
    ]
)
FIELD = np.dtype([("type", "<u1"), ("name", "S16"), ("arguments", "<u1", (1024,))])
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("image", IMAGE), ("label", "<i8")], align=True)
ALLOCATION = np.dtype([("sample", "<u8"), ("data_ptr", "<u8"), ("size", "<u8")])


class Beton:
    """One split's stored images and labels, memory-mapped; picklable, so that worker processes can open their own.

    labels: int64 (N,).  heights, widths: int64 (N,), of the stored images.  is_jpeg: bool (N,), False for raw pixels.
    storage: the whole file, uint8 (n,), read-only; image i is the `sizes[i]` bytes from `offsets[i]` on, int64 (N,).
    DamageError when the file is absent, no .beton file, of another layout or cut short.
    """

    in_memory = True

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.storage = self._map()
        header = self._table(HEADER, 0, 1)[0]
        if header["version"] != VERSION:
            raise self._unusable(f"its format version is {header['version']}, not {VERSION}")
        fields = self._table(FIELD, HEADER.itemsize, int(header["num_fields"]))
        if [(int(f["type"]), f["name"]) for f in fields] != [(RGB_FIELD, b"image"), (INT_FIELD, b"label")]:
            raise self._unusable("its fields are not an RGB 'image' and an int 'label'")
        if header["num_samples"] == 0:
            raise self._unusable("it holds no images")
        # FFCV writes the table's address last: zero means that the writer never finished.
        if header["allocation_table"] == 0:
            raise self._unusable("its writer did not finish")
        first = HEADER.itemsize + fields.nbytes
        samples = self._table(SAMPLE, first, int(header["num_samples"]))
        table = int(header["allocation_table"])
        self.offsets = samples["image"]["data_ptr"].astype(np.int64)
        self.sizes = self._stored_sizes(table)
        self.is_jpeg = samples["image"]["mode"] == JPEG
        self.heights = samples["image"]["height"].astype(np.int64)
        self.widths = samples["image"]["width"].astype(np.int64)
        self.labels = samples["label"].astype(np.int64)
        self._check_records(samples["image"]["mode"], first + samples.nbytes, table)

    def __reduce__(self) -> tuple:
        return Beton, (self.path,)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(H, W) when all stored images have one size, else None."""
        return common_shape(self.heights, self.widths)

    def encoded(self, i: int) -> np.ndarray:
        """What is stored for image `i`, a read-only view uint8 (n,): a JPEG file where `is_jpeg[i]`, else pixels."""
        return self.storage[self.offsets[i] : self.offsets[i] + self.sizes[i]]

    def image(self, i: int) -> np.ndarray:
        """Image `i` as RGB uint8 (H, W, 3), read-only where stored raw; DamageError naming it when it is damaged."""
        height, width = int(self.heights[i]), int(self.widths[i])
        if not self.is_jpeg[i]:
            return self.encoded(i).reshape(height, width, 3)
        try:
            return decode_jpeg(self.encoded(i), height, width)
        except ValueError as error:
            raise DamageError(f"{self.path}, image {i}: {error}; convert the data set again") from error

    def _map(self) -> np.ndarray:
        if not self.path.is_file():
            raise DamageError(f"{self.path} does not exist: convert the data set first")
        if self.path.stat().st_size < HEADER.itemsize:
            raise self._unusable("it is shorter than a header")
        return map_file(self.path)

    def _table(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        end = offset + count * dtype.itemsize
        if end > self.storage.size:
            raise self._unusable("it is cut short")
        return self.storage[offset:end].view(dtype)

    def _stored_sizes(self, table: int) -> np.ndarray:
        """The bytes of each image; the allocation table has them in the order in which they were written."""
        count = max(self.storage.size - table, 0) // ALLOCATION.itemsize
        allocations = self._table(ALLOCATION, table, count)
        order = np.argsort(allocations["sample"], kind="stable")
        numbers, addresses = allocations["sample"][order], allocations["data_ptr"][order].astype(np.int64)
        if count != len(self.offsets) or (numbers != np.arange(count)).any() or (addresses != self.offsets).any():
            raise self._unusable("its allocation table misses images")
        return allocations["size"][order].astype(np.int64)

    def _check_records(self, modes: np.ndarray, first: int, table: int) -> None:
        """DamageError naming an image whose record cannot be right; the data lie between `first` and `table`.

        What is damaged in an image's own bytes shows when it is decoded.
        """
        by_place = np.argsort(self.offsets, kind="stable")
        overlaps = np.zeros(len(self.offsets), dtype=bool)
        overlaps[by_place[1:]] = np.diff(self.offsets[by_place]) < self.sizes[by_place[:-1]]
        wrong = {
            "is neither a JPEG nor raw pixels": (modes != JPEG) & (modes != RAW),
            "has a side of 0 pixels": (self.heights == 0) | (self.widths == 0),
            "lies outside of the file's data": (self.offsets < first)
            | (self.sizes < 1)
            | (self.offsets > table - self.sizes),
            "has more or fewer bytes than pixels": ~self.is_jpeg & (self.sizes != 3 * self.heights * self.widths),
            "begins inside of another one": overlaps,
            "has a negative label": self.labels < 0,
        }
        for what, where in wrong.items():
            if where.any():
                raise self._unusable(f"image {int(where.argmax())} {what}")

    def _unusable(self, why: str) -> DamageError:
        return DamageError(f"{self.path} cannot be read as a converted split: {why}. Convert the data set again")
