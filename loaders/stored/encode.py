"""What is stored for an image: the source's own JPEG file where it serves, else a file or pixels that are made here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loaders.sources.decode import MAX_PIXELS, decode_bytes, has_end, plain_jpeg
from loaders.sources.split import EncodedImages, Split, called
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.image_check import MAX_SIDE, content_key
from loaders.stored.image_header import jpeg_size

JPEG_OVER_PIXELS = 1 << 16  # bytes by which a JPEG file may be longer than its pixels


@dataclass(frozen=True)
class Encoded:
    """An image of a source as it is stored.

    size: (height, width) of the source's image. key: `content_key` of its file, 0 where it has none.
    kept: whether `file` is the source's own file.
    beton: of a .beton file, a JPEG file where `is_jpeg`, else the pixels; empty where none is wanted.
    file: of a shard, a JPEG or PNG file; empty where none is wanted.
    """

    size: tuple[int, int]
    key: int
    kept: bool
    is_jpeg: bool
    beton: bytes | memoryview
    file: bytes


def encode(split: Split, i: int, options: FfcvOptions, formats: Sequence[str]) -> Encoded:
    """Image i as `formats` store it, read once and decoded once.

    Raw pixels beside shards decode a JPEG file that the shards keep twice: pixels are Pillow's, and libjpeg has to take
    the file, too. Raises ValueError with the reason when the image cannot be converted.
    """
    data = split.contents(i) if isinstance(split, EncodedImages) else None
    may_keep = data is not None and (options.mode == "jpg" or "dali" in formats)
    size, image = (0, 0), None
    own = kept_jpeg(data, options.max_resolution) if data is not None and may_keep else None
    if own is not None:
        size = own.shape[:2]
    if own is None or ("ffcv" in formats and options.mode != "jpg"):
        image = split.image(i) if data is None else decode_bytes(data)
        size = image.shape[:2]
        if max(size) > MAX_SIDE:
            raise ValueError(f"{size[1]}x{size[0]}: no side may be longer than {MAX_SIDE}")
        image = np.ascontiguousarray(scaled(image, stored_sizes(np.array([size]), options.max_resolution)[0]))
    is_jpeg = options.mode == "jpg" or (options.mode == "proportion" and _drawn(split, i))
    jpeg = data if own is not None else None
    if jpeg is None and is_jpeg:
        assert image is not None
        jpeg = jpeg_file(image, options.jpeg_quality)
    beton, file = jpeg, jpeg
    if not is_jpeg and image is not None:
        beton = image.reshape(-1).data
    if file is None and "dali" in formats:
        assert image is not None
        file = png_file(image)
    key = 0 if data is None else content_key(data)
    return Encoded(
        size,
        key,
        own is not None,
        is_jpeg,
        beton if beton is not None and "ffcv" in formats else b"",
        file if file is not None and "dali" in formats else b"",
    )


def _drawn(split: Split, i: int) -> bool:
    """Whether image i is among the half of mode "proportion"; its name decides, whenever it is stored."""
    return content_key(called(split, i).encode("utf-8", "surrogateescape")) % 2 == 0


def stored_sizes(sizes: np.ndarray, max_resolution: int | None) -> np.ndarray:
    """The (height, width) that images of `sizes`, int64 (N, 2), are stored with: int64 (N, 2).

    The longer side becomes exactly `max_resolution` and no side less than 1; FFCV's own resizing truncates, which gives
    255 for some sizes that should give 256, and 0 for very elongated images.
    """
    if max_resolution is None:
        return sizes
    longer = sizes.max(axis=1, keepdims=True)
    scaled = np.maximum(np.rint(sizes * (max_resolution / np.maximum(longer, 1))), 1).astype(np.int64)
    return np.where(longer > max_resolution, scaled, sizes)


def scaled(image: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The image, uint8 (H, W, 3), with the (height, width) it is stored with, by area interpolation."""
    height, width = (int(side) for side in size)
    if image.shape[:2] == (height, width):
        return image
    import cv2  # lazily: usage errors must not wait for it

    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def kept_jpeg(data: bytes, max_resolution: int | None) -> np.ndarray | None:
    """The pixels of a JPEG file that is stored as it is, uint8 (H, W, 3); None for one that is encoded anew or damaged.

    It is kept when `kept_size` says so and the strictest of the decoders that will read it takes it: Pillow passes over
    flaws of which libjpeg warns. What that decoder takes is whole, so no other one has to look at it.
    """
    size = kept_size(data, max_resolution)
    if size is None:
        return None
    from loaders.stored.ffcv_kernels import decode_jpeg  # lazily, as above

    try:
        return decode_jpeg(np.frombuffer(data, dtype=np.uint8), *size)
    except ValueError:
        return None


def kept_size(data: bytes, max_resolution: int | None) -> tuple[int, int] | None:
    """(height, width) of a JPEG file that is kept unless its pixels are damaged; None for what is written anew.

    It is kept when it needs no scaling, when every reader shows the same pixels from it (`plain_jpeg`), and when
    nothing long lies in it beside the pixels.
    """
    height, width = jpeg_size(data) if data.startswith(b"\xff\xd8") else (0, 0)
    if not 0 < height * width <= MAX_PIXELS or (max_resolution is not None and max(height, width) > max_resolution):
        return None
    if len(data) > 3 * height * width + JPEG_OVER_PIXELS or not has_end(data):
        return None
    try:
        return None if plain_jpeg(data) is None else (height, width)
    except Exception:  # Pillow's, of many types; `decode_bytes` says whether the file is damaged, and how
        return None


def jpeg_file(image: np.ndarray, quality: int) -> bytes:
    """The JPEG file of an image, uint8 (H, W, 3) RGB."""
    import cv2  # lazily, as above

    return _file(image, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def png_file(image: np.ndarray) -> bytes:
    """The PNG file of an image, uint8 (H, W, 3) RGB."""
    return _file(image, ".png", [])


def _file(image: np.ndarray, kind: str, options: list[int]) -> bytes:
    import cv2  # lazily, as above

    written, data = cv2.imencode(kind, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    assert written, image.shape
    return data.tobytes()
