"""The file that is stored for an image: the source's own JPEG where it serves, else one that is made here."""

from __future__ import annotations

import numpy as np

from loaders.sources.split import Split

JPEG_OVER_PIXELS = 1 << 16  # bytes by which a JPEG file may be longer than its pixels; FFCV's pages have room for that


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


def scaled_image(split: Split, i: int, size: np.ndarray) -> np.ndarray:
    """Image i, uint8 (h, w, 3), with the (height, width) it is stored with, by area interpolation.

    ValueError, with the image's name, when it cannot be decoded.
    """
    try:
        image = split.image(i)
    except Exception as error:
        raise ValueError(f"{split.name(i)}: {error}") from error
    return scaled(image, size)


def scaled(image: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The image, uint8 (H, W, 3), with the (height, width) it is stored with, by area interpolation."""
    height, width = (int(side) for side in size)
    if image.shape[:2] == (height, width):
        return image
    import cv2  # lazily: usage errors must not wait for it

    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def own_jpeg(split: Split, i: int, original: np.ndarray, size: np.ndarray) -> bytes | None:
    """The source's JPEG file of image i where it can be stored as it is; None where it has to be encoded anew.

    original, size: (height, width) of the image, and that it is stored with. It is kept when it needs no scaling, when
    every reader shows the same pixels from it (`plain_jpeg`), and when nothing long lies in it beside the pixels.
    """
    if (size != original).any():
        return None
    try:
        data = split.encoded(i)
    except Exception as error:
        raise ValueError(f"{split.name(i)}: {error}") from error
    height, width = (int(side) for side in size)
    kept = data is not None and is_short(data, height, width) and _readable(data, height, width)
    return data if kept else None


def is_short(data: bytes, height: int, width: int) -> bool:
    """Whether a JPEG file of so many pixels is no longer than these, or not much."""
    return len(data) <= 3 * height * width + JPEG_OVER_PIXELS


def jpeg_file(split: Split, i: int, original: np.ndarray, size: np.ndarray, quality: int) -> bytes:
    """`own_jpeg`, or a JPEG file of `quality` that is encoded here."""
    data = own_jpeg(split, i, original, size)
    if data is not None:
        return data
    import cv2  # lazily, as above

    return encoded_file(scaled_image(split, i, size), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality])


def encoded_file(image: np.ndarray, kind: str, options: list[int] | None = None) -> bytes:
    """The file of an image, uint8 (H, W, 3) RGB; kind: ".jpg" or ".png"."""
    import cv2  # lazily, as above

    written, data = cv2.imencode(kind, image[:, :, ::-1], options or [])
    assert written, image.shape
    return data.tobytes()


def _readable(data: bytes, height: int, width: int) -> bool:
    """Whether the strictest decoder of those that will read these JPEG bytes takes them.

    Pillow, which checked them, passes over flaws that libjpeg only warns of; such a file is written anew.
    """
    from loaders.stored.ffcv_kernels import decode_jpeg  # lazily, as above

    try:
        decode_jpeg(np.frombuffer(data, dtype=np.uint8), height, width)
    except ValueError:
        return False
    return True
