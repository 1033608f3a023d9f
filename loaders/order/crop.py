"""How a stored image becomes a fixed-size one: crop rectangles as plain arrays, shared by all backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from fastlt.names import unknown

KINDS = ("none", "center", "random_resized")
ATTEMPTS = 10  # draws before the fallback crop, as in torchvision's and FFCV's random-resized crop
PIECE = 1 << 14  # images whose rectangles are drawn at a time, at most: 2 MB; of few images it is a fiftieth
# Called with the number of an attempt and with images, it yields parts of these and numbers for them, which may be
# overwritten: uniform in [0, 1), float64 (4, n), for area, shape, and place down and across.
Draws = Callable[[int, "range | np.ndarray"], Iterator[tuple[np.ndarray, np.ndarray]]]


@dataclass(frozen=True)
class CropSpec:
    """How an image becomes (size, size) on the host.

    kind: "none" keeps the stored image; "center" takes the central square of side ratio * min(H, W);
        "random_resized" takes a random rectangle (train only). Both resize to (size, size): by area interpolation
        where the rectangle shrinks, and bilinearly where a side of it grows.
    size: output side in pixels, >= 1 unless kind is "none".
    ratio: side of the central square over min(H, W), in (0, 1].
    scale: range of the random rectangle's area over the image's.
    aspect: range of its width over its height, drawn log-uniformly.

    Raises ValueError for values outside these ranges.
    """

    kind: str
    size: int = 0
    ratio: float = 224 / 256
    scale: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(unknown("crop kind", self.kind, KINDS))
        if self.kind != "none" and self.size < 1:
            raise ValueError(
                f"crop size {self.size} for a {self.kind!r} crop: give the output side in pixels, e.g. 224"
            )
        if not 0 < self.ratio <= 1:
            raise ValueError(f"crop ratio {self.ratio}: the central square's share of the short side, above 0 up to 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"crop scale {self.scale}: needs 0 < low <= high <= 1, e.g. (0.08, 1.0)")
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"crop aspect {self.aspect}: needs 0 < low <= high, e.g. (3/4, 4/3)")

    def output_shape(self, heights: np.ndarray, widths: np.ndarray) -> tuple[int, int]:
        """(H, W) of every cropped image; ValueError for kind "none" when the stored sizes differ."""
        if self.kind != "none":
            return self.size, self.size
        shape = common_shape(heights, widths)
        if shape is None:
            raise ValueError(
                f"crop kind 'none' needs images of one size, but heights run from {heights.min()} to {heights.max()} "
                f"and widths from {widths.min()} to {widths.max()}: use a 'center' or 'random_resized' crop"
            )
        return shape


def common_shape(heights: np.ndarray, widths: np.ndarray) -> tuple[int, int] | None:
    """(H, W) when all images have one size, else None."""
    if (heights == heights[0]).all() and (widths == widths[0]).all():
        return int(heights[0]), int(widths[0])
    return None


def whole_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The rectangles that keep everything, int32 (N, 4) as (top, left, height, width)."""
    zeros = np.zeros_like(heights)
    return np.stack([zeros, zeros, heights, widths], axis=1).astype(np.int32)


def center_boxes(heights: np.ndarray, widths: np.ndarray, ratio: float) -> np.ndarray:
    """Central squares of side floor(ratio * min(H, W)), at least 1, int32 (N, 4) as (top, left, height, width).

    Source: FFCV's center crop, which evaluation follows (rounding down, also of the offsets).
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    side = np.maximum(np.floor(ratio * np.minimum(heights, widths)).astype(np.int64), 1)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int32)


def random_resized_boxes(
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    draws: Draws,
    images: np.ndarray | None = None,
    dtype: Any = np.int32,
) -> np.ndarray:
    """One random rectangle for each of `images`, or of all, (N, 4) of a type as (top, left, height, width).

    The area is uniform in scale * H * W, the aspect (width over height) log-uniform, the place uniform. A rectangle
    that does not fit is drawn again, up to ten times; then the largest central one within the aspect range is taken.
    Source: Inception-style cropping (Szegedy et al. 2015) with torchvision's RandomResizedCrop as its definition.
    """
    count = len(heights) if images is None else len(images)
    boxes = np.empty((count, 4), dtype=dtype)

    def sides(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        of = part if images is None else images[part]
        return heights[of].astype(np.int64), widths[of].astype(np.int64)

    pending: range | np.ndarray = range(count)
    for attempt in range(ATTEMPTS):
        if not len(pending):
            break
        left = []
        for part, numbers in draws(attempt, pending):
            drawn, fits = _drawn_boxes(*sides(part), scale, aspect, numbers)
            boxes[part[fits]] = drawn.T[fits]
            left.append(part[~fits].astype(np.int32))
        pending = np.concatenate(left)
        del left
    rest = np.asarray(pending, dtype=np.int32)
    boxes[rest] = _fallback_boxes(*sides(rest), aspect)
    return boxes


def _drawn_boxes(
    height: np.ndarray,
    width: np.ndarray,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    numbers: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The rectangles that one attempt draws, and which of them fit: whole numbers as float64 (4, n), and bool (n,).

    height, width: int64 (n,). numbers: float64 (4, n), see `Draws`; the rectangles are written in their place.
    """
    area, shape, place_y, place_x = numbers
    area *= scale[1] - scale[0]
    area += scale[0]
    area *= height * width
    low, high = np.log(aspect[0]), np.log(aspect[1])
    shape *= high - low
    shape += low
    np.exp(shape, out=shape)
    w = area * shape
    h = np.divide(area, shape, out=area)
    for side in (w, h):
        np.rint(np.sqrt(side, out=side), out=side)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    place_y *= height - h + 1
    place_x *= width - w + 1
    np.floor(place_y, out=place_y)
    np.floor(place_x, out=place_x)
    return np.stack([place_y, place_x, h, w]), fits


def drawn_in_turn(rng: np.random.Generator) -> Draws:
    """The next numbers of a generator, which has to be `default_rng`'s: all areas, all shapes, all places.

    Memory is needed for some of the images at a time: the four kinds are drawn by copies of the generator.
    """

    def draws(attempt: int, pending: range | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        kinds = []
        for kind in range(4):
            bits: Any = np.random.PCG64()
            bits.state = rng.bit_generator.state
            kinds.append(np.random.Generator(bits.advance(kind * len(pending))))
        piece = min(PIECE, max(1, PIECE >> 4, len(pending) // 50))
        for start in range(0, len(pending), piece):
            part = as_array(pending[start : start + piece])
            numbers = np.empty((4, len(part)))
            for one, row in zip(kinds, numbers, strict=True):
                one.random(out=row)
            yield part, numbers
        cast("np.random.PCG64", rng.bit_generator).advance(4 * len(pending))

    return draws


def drawn_by_place(stream: Sequence[int], places: np.ndarray) -> Draws:
    """Numbers that follow from the seeds `stream` and from the place of an image alone, whatever else is drawn.

    places: int64 (N,), of the images. Source: SplitMix64, Steele et al. 2014, as a function of its counter.
    """
    key = np.random.SeedSequence(stream).generate_state(1, np.uint64)

    def draws(attempt: int, pending: range | np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        pending = as_array(pending)
        first = (places[pending].astype(np.uint64) * ATTEMPTS + attempt) * 4
        z = (first + np.arange(4, dtype=np.uint64)[:, None]) * np.uint64(0x9E3779B97F4A7C15) + key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        yield pending, ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53

    return draws


def as_array(images: range | np.ndarray) -> np.ndarray:
    """Images by their numbers: a range, which takes no memory, as an array."""
    return np.arange(images.start, images.stop) if isinstance(images, range) else images


def _fallback_boxes(heights: np.ndarray, widths: np.ndarray, aspect: tuple[float, float]) -> np.ndarray:
    """The largest central rectangle whose aspect lies in the range, int32 (N, 4)."""
    h = np.where(widths < aspect[0] * heights, np.rint(widths / aspect[0]).astype(np.int64), heights)
    w = np.where(widths > aspect[1] * heights, np.rint(heights * aspect[1]).astype(np.int64), widths)
    h, w = np.clip(h, 1, heights), np.clip(w, 1, widths)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1).astype(np.int32)


def crop_boxes(spec: CropSpec, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The rectangles `spec` takes from images of these sizes where it draws nothing at random, int32 (N, 4)."""
    assert spec.kind != "random_resized", "drawn by `random_resized_boxes`"
    return whole_boxes(heights, widths) if spec.kind == "none" else center_boxes(heights, widths, spec.ratio)
