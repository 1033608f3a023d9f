"""FFCV's two C kernels and how to import FFCV without its side effects.

Every host backend decodes JPEGs and resizes with the very functions FFCV's own loader calls, so that a picture has the
same pixels whichever backend delivers it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from loaders.stored.image_header import jpeg_size


@contextlib.contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restores torch's thread count on exit: importing FFCV and building its Loader both set it."""
    import torch  # lazily: a conversion's usage errors must not wait for it

    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def kernels():
    """FFCV's module of C functions; the first call imports it, which takes seconds: before forking, not after."""
    with keep_torch_threads():
        from ffcv import libffcv
    return libffcv


def decode_jpeg(encoded: np.ndarray, height: int, width: int) -> np.ndarray:
    """RGB pixels uint8 (H, W, 3) of JPEG bytes uint8 (n,).

    Raises ValueError when the bytes are damaged, cut short or of another size. libjpeg-turbo with its fast DCT, as FFCV
    decodes; the accurate DCT of other decoders differs by about 1 level on average.
    """
    found = jpeg_size(encoded.data)
    if found != (height, width):  # the decoder would leave pixels unwritten, or write past the end of them
        raise ValueError(f"damaged JPEG data (its header says {found[0]}x{found[1]}, it should be {height}x{width})")
    image = np.empty((height, width, 3), dtype=np.uint8)
    if kernels().imdecode(encoded, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
        raise ValueError(f"damaged JPEG data ({encoded.size} bytes that should give {height}x{width})")
    return image


def resize_crop(image: np.ndarray, box: Sequence[int], out: np.ndarray) -> None:
    """Writes the rectangle `box` of `image`, resized by area interpolation, into `out`.

    image: uint8 (H, W, 3), contiguous.  box: (top, left, height, width).  out: uint8 (h, w, 3), contiguous,
        overwritten.
    """
    top, left, height, width = (int(value) for value in box)
    if (height, width) == out.shape[:2]:
        out[:] = image[top : top + height, left : left + width]
    else:
        kernels().resize_crop(image, top, top + height, left, left + width, out)
