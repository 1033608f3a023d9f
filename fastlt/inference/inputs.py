"""Images to predict, in any of the forms that users have, and batches of them, decoded while the network works."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from PIL import Image
from torch import Tensor

from fastlt.inference.transform import EvaluationTransform, ReadableImage, StoredImage
from fastlt.paths import expand
from loaders.sources.image_folder import files_below
from loaders.sources.messages import printable
from loaders.stored.as_stored import pillow_pixels
from loaders.stored.ffcv_kernels import kernels

AHEAD = 2  # batches that are decoded ahead of the one that the network works on
TASKS = 4  # a batch and a worker: few enough that handing them over costs nothing, and enough that all end together
COMPILED_FROM = 1000  # images: fewer are decoded before the loop over them is compiled


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read: its path, or None for one that was given as pixels, its position, and why."""

    source: str | None
    position: int
    reason: str

    @property
    def called(self) -> str:
        """As `Prediction.called`."""
        return str(self.position) if self.source is None else printable(self.source)


@dataclass(frozen=True)
class CutBatch:
    """Consecutive images that could be read, and those among them that could not.

    positions: int64 (n,), of `pixels`, uint8 (n, S, S, 3), among all images.
    """

    positions: np.ndarray
    pixels: np.ndarray
    unreadable: list[Unreadable]


def gathered(images: Any) -> list[ReadableImage]:
    """The images of what a user gave, files in order: paths for files, pixels as they are.

    images: a path, of a file or of a folder that is searched with all folders below it; the bytes of a file, or an open
    file; an image of Pillow; uint8 pixels as an array (H, W, 3), (H, W) or (N, H, W, 3), or as a tensor (3, H, W) or
    (N, 3, H, W); or a list of these. ValueError for anything else, and for a folder without images. Whether files can
    be read is found out later.
    """
    if isinstance(images, StoredImage):
        return [images]
    if isinstance(images, str | os.PathLike):
        is_name = isinstance(images, Path) and str(images).startswith("~") and os.path.lexists(images)
        path = Path(images) if is_name else Path(expand(os.fspath(images)))  # a name that is no home folder
        # isdir answers False for a name that cannot be looked at, which is told with the images that cannot be read.
        return [*images_below(path)] if os.path.isdir(path) else [path]
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, Tensor):
        return _of_tensor(images)
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, bytes | bytearray | memoryview):
        return [StoredImage(None, partial(_whole, bytes(images)))]
    read = getattr(images, "read", None)
    if callable(read):
        data = read()
        if not isinstance(data, bytes):
            raise ValueError(f"a file that is read as {type(data).__name__}: open images with mode 'rb'")
        return [StoredImage(None, partial(_whole, data))]
    if isinstance(images, Iterable):
        return [one for image in images for one in gathered(image)]
    raise ValueError(f"images of type {type(images).__name__}: give paths, images of Pillow, arrays or tensors")


def _whole(data: bytes) -> bytes:
    """The bytes of a file; ValueError for none."""
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    return data


def _of_tensor(images: Tensor) -> list[ReadableImage]:
    if images.is_floating_point() or images.ndim not in (3, 4) or images.shape[-3] != 3:
        raise ValueError(
            f"a tensor of type {images.dtype} and shape {tuple(images.shape)}: give pixels, uint8 (N, 3, H, W), or "
            "what `transform` makes, float (N, 3, S, S), all in one tensor or all in one list"
        )
    return [image.permute(1, 2, 0).cpu().numpy() for image in (images if images.ndim == 4 else images[None])]


def images_below(folder: Path) -> list[Path]:
    """The image files below a folder, sorted; ValueError when there are none.

    As in a data set of source image_folder: links are followed, hidden and system files are passed over, and an image
    is known by its extension or by its first bytes. A folder that may not be read is listed as if it were an image.
    """
    unreadable: list[Path] = []
    files = files_below(folder, lambda error: unreadable.append(Path(error.filename)))
    found = [path for path, is_image in files if is_image] + unreadable
    if not found:
        raise ValueError(f"{folder} holds no images, nor does a folder below it")
    return sorted(found)


def name_of(image: ReadableImage) -> str | None:
    """What to call an image: its path as it was given; None for pixels and bytes, which have their position."""
    if isinstance(image, StoredImage):
        return image.name
    return str(image) if isinstance(image, Path) else None


def cut_batches(
    images: Sequence[ReadableImage], transform: EvaluationTransform, batch_size: int, workers: int
) -> Iterator[CutBatch]:
    """The images in order, `batch_size` at a time, decoded and cut by `workers` threads, AHEAD batches ahead.

    Threads, because decoding and cutting leave the interpreter's lock alone. What cannot be read is told with its
    batch.
    """
    kernels()  # imports FFCV, which sets torch's number of threads: not in several threads at once
    images = _repeated_loaded(images)
    starts = iter(range(0, len(images), batch_size))
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[tuple[int, np.ndarray, list[Future[list[tuple[int, str]]]]]] = deque()

    def begin(start: int) -> None:
        count = min(batch_size, len(images) - start)
        pixels = np.empty((count, transform.size, transform.size, 3), dtype=np.uint8)
        share = max(1, -(-count // (TASKS * workers)))
        parts = [range(first, min(first + share, count)) for first in range(0, count, share)]
        waiting.append((start, pixels, [pool.submit(_write, images, transform, start, pixels, part) for part in parts]))

    try:
        for start in islice(starts, 1 + AHEAD):
            begin(start)
        while waiting:
            first, pixels, tasks = waiting.popleft()
            failed = [failure for task in tasks for failure in task.result()]
            for start in starts:
                begin(start)
                break
            yield _batch(images, first, pixels, failed)
    finally:
        pool.shutdown(cancel_futures=True)


def _repeated_loaded(images: Sequence[ReadableImage]) -> Sequence[ReadableImage]:
    """The images; of those of Pillow that are there twice the files are read, which two threads may not do at once.

    One that cannot be decoded is replaced by its reason: Pillow would read its file again each time it is asked.
    """
    times = Counter(id(image) for image in images if isinstance(image, Image.Image))
    failed: dict[int, StoredImage] = {}
    for image in images:
        if isinstance(image, Image.Image) and times[id(image)] > 1:
            times[id(image)] = 1
            try:
                pillow_pixels(image)
            except ValueError as error:
                failed[id(image)] = StoredImage(None, partial(_raise, str(error)))
    return [failed.get(id(image), image) for image in images] if failed else images


def _raise(reason: str) -> NoReturn:
    raise ValueError(reason)


def _write(
    images: Sequence[ReadableImage], transform: EvaluationTransform, start: int, pixels: np.ndarray, part: range
) -> list[tuple[int, str]]:
    """Decode and cut a part of a batch; (place, reason) of the images that cannot be read."""
    given = images[start + part.start : start + part.stop]
    failed = transform.write(given, pixels[part.start : part.stop], compiled=len(images) >= COMPILED_FROM)
    return [(part.start + place, reason) for place, reason in failed]


def _batch(images: Sequence[ReadableImage], start: int, pixels: np.ndarray, failed: list[tuple[int, str]]) -> CutBatch:
    positions = np.arange(start, start + len(pixels))
    unreadable = [Unreadable(name_of(images[start + place]), start + place, reason) for place, reason in failed]
    if not failed:
        return CutBatch(positions, pixels, unreadable)
    kept = np.ones(len(pixels), dtype=bool)
    kept[[place for place, _ in failed]] = False
    return CutBatch(positions[kept], pixels[kept], unreadable)
