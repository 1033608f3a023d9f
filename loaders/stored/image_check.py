"""Decoding every image once before a conversion: what is bad is known by path, and how big each one is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loaders.sources.split import SPLITS, ArraySplit, Source, Split
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
    """

    sizes: np.ndarray
    bad: tuple[BadImage, ...]

    @property
    def good(self) -> np.ndarray:
        """Indices of the images that can be converted, int64."""
        return np.setdiff1d(np.arange(len(self.sizes)), [image.index for image in self.bad])


def check_source(
    source: Source, *, num_workers: int | None = None, progress: bool = True, timeout_s: float = STUCK_S
) -> dict[str, ImageCheck]:
    """Decode every image of every split once (`check_images`)."""
    assert set(source.splits) == set(SPLITS), sorted(source.splits)
    checks = {}
    for name, split in source.splits.items():
        shown = progress and not isinstance(split, ArraySplit)  # in memory, nothing is to be decoded
        with progress_bar(f"check {name}", len(split), shown) as advance:
            checks[name] = check_images(split, num_workers=num_workers, advance=advance, timeout_s=timeout_s)
    return checks


def refuse_bad_images(source: Source, checks: Mapping[str, ImageCheck], on_error: str) -> None:
    """Refuse bad images ("stop"), or a split that they leave without images of a class ("skip")."""
    bad: list[BadImage] = [image for check in checks.values() for image in check.bad]
    if bad and on_error == "stop":
        more = f"\n  … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listed = "".join(f"\n  {image}" for image in bad[:SHOWN])
        raise ValueError(
            f"{len(bad)} of {sum(len(split) for split in source.splits.values())} images cannot be converted; "
            f"replace them, or leave them out with --on-error skip:{listed}{more}"
        )
    for name, check in checks.items():
        counts = np.bincount(source.splits[name].labels[check.good], minlength=source.num_classes)
        empty = [source.class_names[c] for c in np.flatnonzero(counts == 0)]
        if empty:
            raise ValueError(
                f"split {name!r} has no image of {len(empty)} of {source.num_classes} classes that can be decoded: "
                f"{', '.join(empty[:5])}{', …' if len(empty) > 5 else ''}"
            )


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
    bad: list[BadImage] = []
    chunks = chunks_of(len(split))
    checked = map_chunks(_check_chunk, split, chunks, num_workers=num_workers, advance=advance, timeout_s=timeout_s)
    for chunk, results in checked:
        for i, (size, reason) in zip(chunk, results, strict=True):
            sizes[i] = size
            if reason is not None:
                bad.append(BadImage(i, split.name(i), reason))
    return ImageCheck(sizes, tuple(sorted(bad, key=lambda image: image.index)))


def _check_chunk(split: Split, chunk: range) -> list[tuple[tuple[int, int], str | None]]:
    results = []
    for i in chunk:
        results.append(_check(split, i))
        image_done()
    return results


def _check(split: Split, i: int) -> tuple[tuple[int, int], str | None]:
    """((height, width), None), or ((0, 0), why it cannot be converted)."""
    try:
        height, width = split.image(i).shape[:2]
    except ValueError as error:
        return (0, 0), str(error)
    if max(height, width) > MAX_SIDE:
        return (0, 0), f"{width}x{height}: no side may be longer than {MAX_SIDE}"
    return (height, width), None
