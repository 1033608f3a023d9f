"""The pixels that evaluation reads of an image, taken from an image that was never converted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from loaders.order.crop import CropSpec, crop_boxes
from loaders.sources.decode import decode_bytes, reasons, upright_rgb
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.encode import kept_size, scaled, stored_sizes
from loaders.stored.ffcv_kernels import NONE_DAMAGED, decode_jpeg, decoding_loop, resize_crop
from loaders.stored.unconverted import UnconvertedDataset


@dataclass(frozen=True)
class Storage:
    """How a data set keeps images, as far as their pixels depend on it.

    keeps_jpeg: whether a JPEG file that needs no scaling is kept as it is, and so decoded by FFCV's function; other
        images hold Pillow's pixels. An image that is scaled and stored as JPEG differs from Pillow's by what its second
        encoding loses, which nothing here repeats.
    max_resolution: longer sides are scaled down to this many pixels; None keeps the size.
    """

    keeps_jpeg: bool = False
    max_resolution: int | None = None

    @classmethod
    def of(cls, dataset: ConvertedDataset | UnconvertedDataset, kind: str, *, encoded: bool = False) -> Storage:
        """Of a data set that is read in the format `kind`.

        encoded: of source files, whether the loader takes their bytes and not Pillow's pixels.
        """
        if isinstance(dataset, UnconvertedDataset):
            return cls(encoded)
        request = dataset.manifest["request"]
        return cls(request.get("mode") == "jpg" or kind == "dali", request.get("max_resolution"))

    def pixels(self, data: bytes) -> np.ndarray:
        """What a loader reads of an image file's bytes, uint8 (H, W, 3) RGB; ValueError with the reason if damaged."""
        size = self.kept_size(data)
        if size is not None:
            with contextlib.suppress(ValueError):  # Pillow may pass over the flaw: then the conversion writes it anew
                return decode_jpeg(np.frombuffer(data, dtype=np.uint8), *size)
        return self.scaled(decode_bytes(data))

    def scaled(self, image: np.ndarray) -> np.ndarray:
        """Pixels uint8 (H, W, 3) in the size in which they are stored."""
        size = np.array([image.shape[:2]], dtype=np.int64)
        return scaled(image, stored_sizes(size, self.max_resolution)[0])

    def kept_size(self, data: bytes) -> tuple[int, int] | None:
        """(height, width) of a JPEG file that is kept unless its pixels are damaged; None for what is written anew."""
        return kept_size(data, self.max_resolution) if self.keeps_jpeg else None


def pillow_pixels(image: Image.Image) -> np.ndarray:
    """An image of Pillow as uint8 (H, W, 3) RGB, as the sources read files; ValueError if it cannot be decoded."""
    with reasons():  # of a file that Pillow has opened and not yet read
        return upright_rgb(image)


def cut(image: np.ndarray, crop: CropSpec, out: np.ndarray) -> None:
    """Write the evaluation's crop of an image, uint8 (H, W, 3), into `out`, uint8 (size, size, 3)."""
    resize_crop(np.ascontiguousarray(image), _boxes(crop, np.array([image.shape[:2]]))[0], out)


def cut_jpegs(files: Sequence[bytes], sizes: Sequence[tuple[int, int]], crop: CropSpec, out: np.ndarray) -> list[int]:
    """Write the evaluation's crops of JPEG files into `out`, uint8 (n, size, size, 3); the places of damaged ones.

    sizes: (height, width), as the headers say. All files are decoded and cut in one compiled call, which gives up the
    interpreter's lock once: a thread that asks for the lock between two images waits for others.
    """
    lengths = np.array([len(data) for data in files])
    stored = (np.frombuffer(b"".join(files), dtype=np.uint8), np.cumsum(lengths) - lengths, lengths)
    heights, widths = np.array(sizes, dtype=np.int64).T.copy()
    is_jpeg, boxes = np.ones(len(files), dtype=bool), _boxes(crop, np.array(sizes))
    scratch = np.empty(3 * int((heights * widths).max()), dtype=np.uint8)
    damaged, todo = [], np.arange(len(files))
    while len(todo):
        at = decoding_loop()(*stored, is_jpeg, heights, widths, todo, boxes[todo], out[todo[0] :], scratch)
        if at == NONE_DAMAGED:
            break
        damaged.append(int(todo[at]))
        todo = todo[at + 1 :]
    return damaged


def _boxes(crop: CropSpec, sizes: np.ndarray) -> np.ndarray:
    """(top, left, height, width) of the evaluation's crops, int32 (n, 4), of images of `sizes`, int64 (n, 2)."""
    assert crop.kind != "random_resized", "evaluation draws nothing at random"
    return crop_boxes(crop, sizes[:, 0], sizes[:, 1])
