"""Images that are no files of their own: bytes, members of tar files, rows of tables, images of converted data sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastlt.inference.inputs import gathered, images_below, name_of
from fastlt.inference.transform import EvaluationTransform, ReadableImage


@dataclass(frozen=True)
class StoredImage:
    """An image that is read when its batch is.

    name: what to call it; None has its position.
    read: gives the bytes of its file, or pixels uint8 (H, W, 3); ValueError with the reason when it cannot be read.
    """

    name: str | None
    read: Callable[[], bytes | np.ndarray]


AnyImage = ReadableImage | StoredImage


def given_images(images: Any) -> list[AnyImage]:
    """The images of what a user gave, as `gathered` has them; and of bytes, of open files, and of lists with these."""
    if isinstance(images, StoredImage):
        return [images]
    if isinstance(images, Path) and str(images).startswith("~") and os.path.lexists(images):
        return [*images_below(images)] if images.is_dir() else [images]  # a name that is no home folder
    if isinstance(images, bytes | bytearray | memoryview):
        return [StoredImage(None, partial(_whole, bytes(images)))]
    read = getattr(images, "read", None)
    if callable(read):
        data = read()
        if not isinstance(data, bytes):
            raise ValueError(f"a file that is read as {type(data).__name__}: open images with mode 'rb'")
        return [StoredImage(None, partial(_whole, data))]
    if isinstance(images, Iterable) and not isinstance(images, str | os.PathLike | Tensor | np.ndarray):
        return [one for image in images for one in given_images(image)]
    return [*gathered(images)]


def image_name(image: AnyImage) -> str | None:
    """What to call an image; None for pixels and bytes, which have their position."""
    return image.name if isinstance(image, StoredImage) else name_of(image)


class ReadingTransform(EvaluationTransform):
    """An evaluation transform that reads stored images, too."""

    @classmethod
    def over(cls, transform: EvaluationTransform) -> ReadingTransform:
        """The same cuts of the same pixels."""
        return cls(**vars(transform))

    def write(self, images: Sequence[AnyImage], out: np.ndarray, *, compiled: bool = False) -> list[tuple[int, str]]:
        failed: list[tuple[int, str]] = []
        places: list[int] = []
        ready: list[Any] = []
        for place, image in enumerate(images):
            try:
                ready.append(image.read() if isinstance(image, StoredImage) else image)
                places.append(place)
            except ValueError as error:
                failed.append((place, str(error)))
        if not failed:
            return super().write(ready, out, compiled=compiled)
        pixels = np.empty((len(ready), *out.shape[1:]), dtype=np.uint8)
        failed += [(places[k], reason) for k, reason in super().write(ready, pixels, compiled=compiled)]
        out[places] = pixels
        return failed


def _whole(data: bytes) -> bytes:
    """The bytes of a file; ValueError for none."""
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    return data
