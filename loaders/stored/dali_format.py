"""Writing a split as WebDataset shards, the format of the DALI loader: plain tar files of JPEG and PNG images."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loaders.sources.split import Split
from loaders.stored.encode import encoded_file, jpeg_file, own_jpeg, scaled_image, stored_sizes
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.forked_workers import STUCK_S, Advance, image_done, map_chunks
from loaders.stored.image_check import BadImage, ImageCheck, check_images
from loaders.stored.tar_shards import BLOCK, COLUMNS, IDX_VERSION, idx_line, member_names, padded, shard_path

SHARD_IMAGES = 1024  # at least, but the last
MOST_SHARDS = 128  # a split: each one stays mapped while it is read, and a process may open about a thousand files
MODES = ("raw", "jpg")


def check_dali_options(options: FfcvOptions) -> None:
    """ValueError for storage options that only FFCV has."""
    if options.mode not in MODES:
        raise ValueError(f"mode {options.mode!r} is FFCV's own: the dali format takes {' or '.join(MODES)}")


def write_shards(
    path: Path,
    split: Split,
    options: FfcvOptions,
    *,
    check: ImageCheck | None = None,
    advance: Advance = lambda n: None,
    shard_images: int = SHARD_IMAGES,
    timeout_s: float = STUCK_S,
) -> list[BadImage]:
    """Write the images of `split` that can be decoded, and their labels, beside the index `path`; return the others.

    A JPEG that the source has keeps its bytes where `own_jpeg` allows it. Any other image is written anew: with mode
    "raw" as PNG, which loses nothing, with mode "jpg" as JPEG of `jpeg_quality`. Sample i is the i-th good image.
    The index is written last, so that a split without one is known to be unfinished.
    check: what `check_images(split)` gave; without it, every image is decoded here first.
    advance: called with the number of images written since the last call.
    shard_images: images a shard; more when there would be more than 128 shards.
    timeout_s: writing processes that finish no image for so long are ended.
    Raises ValueError when no image is good, the mode is FFCV's own, or a writing process dies.
    """
    from loaders.stored.ffcv_kernels import kernels  # lazily: usage errors must not wait for torch and FFCV

    check_dali_options(options)
    check = check or check_images(split, num_workers=options.num_workers)
    if not len(check.good):
        raise ValueError(f"{path.name}: none of the {len(split)} images can be decoded")
    count = len(check.good)
    size = max(shard_images, -(-count // MOST_SHARDS))
    sizes = stored_sizes(check.sizes[check.good], options.max_resolution)
    shards = _Shards(path, split, check.good, check.sizes[check.good], sizes, options, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    places = np.zeros((count, 2), dtype=np.int64)
    chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
    kernels()  # here, and not in each process of each split
    workers = options.num_workers
    done = map_chunks(_write_shard, shards, chunks, num_workers=workers, advance=advance, timeout_s=timeout_s)
    for chunk, written in done:
        places[chunk.start : chunk.stop] = written
    first = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    labels = split.labels[check.good].astype(np.int64)
    columns = (first, places[:, 0], places[:, 1], sizes[:, 0], sizes[:, 1], labels)
    partial = path.with_name(path.stem + ".partial.npz")
    np.savez(partial, **dict(zip(COLUMNS, columns, strict=True)))
    os.replace(partial, path)
    return list(check.bad)


@dataclass(frozen=True)
class _Shards:
    """What a writing process needs: sample k is image `good[k]`, of size `original[k]`, stored with `sizes[k]`."""

    path: Path
    split: Split
    good: np.ndarray
    original: np.ndarray
    sizes: np.ndarray
    options: FfcvOptions
    shard_images: int


def _write_shard(shards: _Shards, chunk: range) -> np.ndarray:
    """Write the samples of `chunk` as one tar file with its index for DALI; (offset, size) of each image's bytes."""
    tar = shard_path(shards.path, chunk.start // shards.shard_images)
    places, lines = [], [f"{IDX_VERSION} {len(chunk)}"]
    with tar.open("wb") as file, _one_thread():
        for k in chunk:
            data = _encode(shards, k)
            image_name, label_name = member_names(k, data)
            image = _add(file, image_name, data)
            label = _add(file, label_name, str(shards.split.labels[shards.good[k]]).encode())
            places.append(image[1:])
            lines.append(idx_line(image, label))
            image_done()
        file.write(bytes(2 * BLOCK))  # the end of a tar file
    tar.with_suffix(".idx").write_text("\n".join(lines) + "\n")
    return np.array(places, dtype=np.int64)


def _add(file, name: str, data: bytes) -> tuple[str, int, int]:
    """Append a member, always with the same owner and time, so that equal images give equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    file.write(member.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data)
    file.write(bytes(padded(len(data)) - len(data)))
    return name, offset, len(data)


def _encode(shards: _Shards, k: int) -> bytes:
    """The file that is stored for sample k."""
    i, original, size = int(shards.good[k]), shards.original[k], shards.sizes[k]
    if shards.options.mode == "jpg":
        return jpeg_file(shards.split, i, original, size, shards.options.jpeg_quality)
    return own_jpeg(shards.split, i, original, size) or encoded_file(scaled_image(shards.split, i, size), ".png")


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenCV's threads do not survive the fork that made this process."""
    import cv2

    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
