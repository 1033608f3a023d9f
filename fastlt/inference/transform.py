"""From an image to what the network sees, as in evaluation: decode, scale, cut, normalise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastlt.augment import normalise
from loaders.order.crop import CropSpec
from loaders.sources.decode import read_image_file
from loaders.stored.as_stored import Storage, cut, cut_jpegs, pillow_pixels

JPEG_BYTES = 8 << 20  # of JPEG files that are collected before they are decoded


@dataclass(frozen=True)
class StoredImage:
    """An image that is read when its batch is.

    name: what to call it; None has its position.
    read: gives the bytes of its file, or pixels uint8 (H, W, 3); ValueError with the reason when it cannot be read.
    """

    name: str | None
    read: Callable[[], bytes | np.ndarray]


ReadableImage = Path | Image.Image | np.ndarray | StoredImage


@dataclass(frozen=True)
class EvaluationTransform:
    """A callable that takes an image to the float32 (3, S, S) that the network saw in evaluation; it can be pickled.

    size: S. crop: the evaluation's. storage: how the evaluated images had been kept. mean, std: one number a channel.
    Where evaluation took whole stored images (crop "none"), an image of another size is cut to its central square.
    """

    size: int
    crop: CropSpec
    storage: Storage
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(
        cls,
        size: int,
        kind: str,
        ratio: float,
        storage: Storage,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
    ) -> EvaluationTransform:
        """Of the keys of a recipe's data: image_size, eval_crop, eval_ratio, mean and std."""
        return cls(size, CropSpec("center", size, ratio=ratio if kind == "center" else 1.0), storage, mean, std)

    def __call__(self, image: ReadableImage) -> Tensor:
        """image: as in `pixels`. ValueError when it cannot be decoded."""
        pixels = torch.from_numpy(self.pixels(image)).permute(2, 0, 1)
        return self.normalise(pixels[None])[0]

    def pixels(self, image: ReadableImage) -> np.ndarray:
        """The image as uint8 (S, S, 3), before it is normalised; ValueError with the reason when it cannot be decoded.

        image: a file, an image of Pillow, or pixels uint8 (H, W, 3) RGB or (H, W) gray.
        """
        out = np.empty((1, self.size, self.size, 3), dtype=np.uint8)
        for _, reason in self.write([image], out):
            raise ValueError(reason)
        return out[0]

    def write(
        self, images: Sequence[ReadableImage], out: np.ndarray, *, compiled: bool = False
    ) -> list[tuple[int, str]]:
        """`pixels` of images into `out`, uint8 (n, S, S, 3); the places and reasons of those that cannot be decoded.

        compiled: whether JPEG files that evaluation decodes by FFCV's function are collected and decoded in one call,
            with the same pixels. It spares threads waits for the interpreter's lock; the first call compiles it for
            some seconds.
        """
        failed: list[tuple[int, str]] = []
        jpegs: list[tuple[int, bytes, tuple[int, int]]] = []
        for place, image in enumerate(images):
            try:
                given = _read(image)
                size = self.storage.kept_size(given) if compiled and isinstance(given, bytes) else None
                if isinstance(given, bytes) and size is not None:
                    jpegs.append((place, given, size))
                else:
                    cut(self._stored(given), self.crop, out[place])
            except ValueError as error:
                failed.append((place, str(error)))
            if sum(len(data) for _, data, _ in jpegs) > JPEG_BYTES:
                failed += self._write_jpegs(jpegs, out)
                jpegs = []
        return failed + self._write_jpegs(jpegs, out)

    def _write_jpegs(self, jpegs: list[tuple[int, bytes, tuple[int, int]]], out: np.ndarray) -> list[tuple[int, str]]:
        """Places in `out`, contents and sizes of JPEG files; as `write`."""
        if not jpegs:
            return []
        places, files, sizes = (list(column) for column in zip(*jpegs, strict=True))
        pixels = np.empty((len(jpegs), *out.shape[1:]), dtype=np.uint8)
        failed = []
        for k in cut_jpegs(files, sizes, self.crop, pixels):
            try:
                cut(self._stored(files[k]), self.crop, pixels[k])
            except ValueError as error:
                failed.append((places[k], str(error)))
        out[places] = pixels
        return failed

    def normalise(self, images: Tensor) -> Tensor:
        """float32 (N, 3, S, S), channels_last, from uint8 of the same shape."""
        return normalise(images, self.mean, self.std)

    def _stored(self, image: bytes | Image.Image | np.ndarray) -> np.ndarray:
        if isinstance(image, bytes):
            return self.storage.pixels(image)
        return self.storage.scaled(pillow_pixels(image) if isinstance(image, Image.Image) else _rgb(image))


def _read(image: ReadableImage) -> bytes | Image.Image | np.ndarray:
    """The bytes of a file, or the image or pixels as they are; ValueError with the reason when it cannot be read."""
    if isinstance(image, StoredImage):
        return image.read()
    return read_image_file(image) if isinstance(image, Path) else image


def _rgb(pixels: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) of an array in that form or (H, W) gray; ValueError for others."""
    gray = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (gray or (pixels.ndim == 3 and pixels.shape[2] == 3)) or not pixels.size:
        raise ValueError(
            f"an array of type {pixels.dtype} and shape {pixels.shape}: give uint8 pixels, RGB (H, W, 3) or gray (H, W)"
        )
    return np.repeat(pixels[:, :, None], 3, axis=2) if gray else pixels
