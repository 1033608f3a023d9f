"""Decoding every image once before a conversion: what is bad is known by path, and how big each one is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from loaders.sources.decode import decode_bytes
from loaders.sources.duplicates import KINDS, Duplicates, find_duplicates, refuse_shared
from loaders.sources.messages import printable, shortened, some
from loaders.sources.source import Source
from loaders.sources.split import SPLITS, ArraySplit, EncodedImages, Split
from loaders.stored.forked_workers import STUCK_S, Advance, chunks_of, image_done, map_chunks
from loaders.stored.progress import progress_bar

MAX_SIDE = 65535  # FFCV stores width and height in 16 bits
SHOWN = 1000  # how many bad images a message names


@dataclass(frozen=True)
class BadImage:
    """An image that cannot be converted: its index in the split, its path, and why."""

    index: int
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class ImageCheck:
    """What decoding every image of a split has shown.

    sizes: int64 (N, 2), (height, width); (0, 0) where the image is bad.
    digests: uint64 (N,), equal for files of equal contents, 0 where there is none; None for images in memory.
    """

    sizes: np.ndarray
    bad: tuple[BadImage, ...]
    digests: np.ndarray | None = None

    @property
    def good(self) -> np.ndarray:
        """Indices of the images that can be converted, int64."""
        return np.setdiff1d(np.arange(len(self.sizes)), [image.index for image in self.bad])

    def of(self, rows: np.ndarray) -> ImageCheck:
        """The check of a subset of good images, rows int64 (K,)."""
        return ImageCheck(self.sizes[rows], (), None if self.digests is None else self.digests[rows])


def check_source(source: Source, *, num_workers: int | None = None, progress: bool = True) -> dict[str, ImageCheck]:
    """Decode every image of every split once (`check_images`), with a progress bar for each split."""
    assert set(source.splits) == set(SPLITS), sorted(source.splits)
    checks = {}
    for name, split in source.splits.items():
        shown = progress and not isinstance(split, ArraySplit)  # in memory, nothing is to be decoded
        with progress_bar(f"check {name}", len(split), shown) as advance:
            checks[name] = check_images(split, num_workers=num_workers, advance=advance)
    return checks


def refuse_bad_images(splits: Mapping[str, Split], checks: Mapping[str, ImageCheck]) -> None:
    """ValueError that lists the images that cannot be converted."""
    bad: list[BadImage] = [image for check in checks.values() for image in check.bad]
    if bad:
        more = f"\n  … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listed = "".join(f"\n  {image}" for image in bad[:SHOWN])
        raise ValueError(
            f"{len(bad)} of {sum(len(split) for split in splits.values())} images cannot be converted; "
            f"replace them, or leave them out with --on-error skip:{listed}{more}"
        )


def refuse_empty_classes(
    splits: Mapping[str, Split], checks: Mapping[str, ImageCheck], class_names: Sequence[str]
) -> None:
    """ValueError when bad images leave a class without training images."""
    counts = np.bincount(splits["train"].labels[checks["train"].good], minlength=len(class_names))
    empty = [name for name, count in zip(class_names, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"split 'train' has no image of {len(empty)} of {len(class_names)} classes that can be decoded: "
            f"{some(empty, ', ')}"
        )


def same_contents(splits: Mapping[str, Split], checks: Mapping[str, ImageCheck]) -> Duplicates:
    """The good images that are files of equal contents; none for images in memory."""
    keys, labels = {}, {}
    for name, check in checks.items():
        if check.digests is not None:
            keys[name], labels[name] = check.digests, splits[name].labels
    return find_duplicates(keys, labels)


def refuse_same_contents(splits: Mapping[str, Split], found: Duplicates) -> None:
    """ValueError when files of equal contents are in two splits."""
    where = {name: f"the {name} split" for name in splits}
    refuse_shared(found, where, lambda split, i: shortened(printable(splits[split].name(i))), "files of equal contents")


def duplicate_notes(splits: Mapping[str, Split], found: Duplicates) -> tuple[str, ...]:
    """One line with the number of groups of each kind, and some names, when there are any."""
    names: dict[str, list[str]] = {}
    for kind, group in found:
        alike = " and ".join(shortened(printable(splits[split].name(i))) for split, i in group[:2])
        names.setdefault(kind, []).append(alike)
    said = [f"{len(of_kind):,} {KINDS[kind]} ({some(of_kind[:10])})" for kind, of_kind in names.items()]
    return (f"files of equal contents: {', '.join(said)}",) if said else ()


def check_images(
    split: Split,
    *,
    num_workers: int | None = None,
    advance: Advance = lambda n: None,
    timeout_s: float = STUCK_S,
) -> ImageCheck:
    """Decode every image of `split` on all cores; images in memory need no decoding.

    num_workers: processes, None for one a core.
    advance: called with the number of images done since the last call.
    timeout_s: processes that finish no image for so long are ended.
    Raises ValueError when a decoding process dies (out of memory, most likely) or all are stuck.
    """
    if isinstance(split, ArraySplit):
        advance(len(split))
        return ImageCheck(np.tile(np.array(split.image_size, dtype=np.int64), (len(split), 1)), ())
    sizes = np.zeros((len(split), 2), dtype=np.int64)
    digests = np.zeros(len(split), dtype=np.uint64)
    bad: list[BadImage] = []
    chunks = chunks_of(len(split))
    checked = map_chunks(_check_chunk, split, chunks, num_workers=num_workers, advance=advance, timeout_s=timeout_s)
    for chunk, results in checked:
        for i, (size, digest, reason) in zip(chunk, results, strict=True):
            sizes[i], digests[i] = size, digest
            if reason is not None:
                bad.append(BadImage(i, split.name(i), reason))
    bad.sort(key=lambda image: image.index)
    return ImageCheck(sizes, tuple(bad), digests if isinstance(split, EncodedImages) else None)


def _check_chunk(split: Split, chunk: range) -> list[tuple[tuple[int, int], int, str | None]]:
    results = []
    for i in chunk:
        try:
            results.append((*check_image(split, i), None))
        except ValueError as error:
            results.append(((0, 0), 0, str(error)))
        image_done()
    return results


def check_image(split: Split, i: int) -> tuple[tuple[int, int], int]:
    """(height, width) of image i, and the `content_key` of its file, 0 where it has none; the file is read once.

    ValueError with the reason when the image cannot be converted.
    """
    data = split.contents(i) if isinstance(split, EncodedImages) else None
    height, width = (split.image(i) if data is None else decode_bytes(data)).shape[:2]
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"{width}x{height}: no side may be longer than {MAX_SIDE}")
    return (height, width), 0 if data is None else content_key(data)


def content_key(data: bytes | memoryview) -> int:
    """A number of 64 bits that follows from the contents of a file, never 0.

    Among a million images two different ones have the same with a probability of 3e-8.
    """
    # Half the time of blake2b, 2 % of decoding a photograph.
    return int.from_bytes(hashlib.sha1(data, usedforsecurity=False).digest()[:8], "little") or 1
