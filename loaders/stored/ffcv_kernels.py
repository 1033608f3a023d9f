"""FFCV's two C kernels, how to import FFCV without its side effects, and how images are enlarged.

Every host backend decodes JPEGs and shrinks images with the very functions FFCV's own loader calls, so that a picture
has the same pixels whichever backend delivers it. FFCV enlarges by OpenCV's area interpolation too, which then repeats
pixels; here what grows is interpolated between pixels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np

from loaders.stored.image_header import jpeg_size

NONE_DAMAGED = -1


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


@functools.cache
def enlarging() -> Callable[[np.ndarray, int, int, int, int, np.ndarray], None]:
    """Bilinear interpolation as numba compiles it, once a process; it runs without the interpreter's lock.

    Called with an image uint8 (H, W, 3), top, left, height and width of a rectangle in it, and `out` uint8 (h, w, 3),
    overwritten. The centres of the outer pixels lie half a pixel inside the edges, as in OpenCV's INTER_LINEAR and
    torch's `align_corners=False`; float32, rounded. Where one side shrinks, its pixels are not averaged.
    """
    with keep_torch_threads():
        from numba import njit

    def compiled(function: Callable) -> Callable[..., Any]:
        return cast("Callable[..., Any]", njit(function, nogil=True, error_model="numpy"))  # numba's stubs deny that

    @compiled
    def place(output, scale, length):
        """The source before an output, and the share of the one after it."""
        at = (output + 0.5) * scale - 0.5
        first = int(np.floor(at))
        if first < 0:
            return 0, np.float32(0)
        if first >= length - 1:
            return length - 1, np.float32(0)
        return first, np.float32(at - first)

    @compiled
    def interpolate_row(row, left, firsts, shares, out):
        last = len(row) - 1
        for x in range(len(firsts)):
            first = left + firsts[x]
            second, share = min(first + 1, last), shares[x]
            for c in range(3):
                before = np.float32(row[first, c])
                out[3 * x + c] = before + share * (np.float32(row[second, c]) - before)

    @compiled
    def enlarge(image, top, left, height, width, out):
        rows, columns = out.shape[0], out.shape[1]
        firsts, shares = np.empty(columns, np.int64), np.empty(columns, np.float32)
        for x in range(columns):
            firsts[x], shares[x] = place(x, width / columns, width)
        upper, lower = np.empty(3 * columns, np.float32), np.empty(3 * columns, np.float32)
        held = -2  # the row in `upper`; `lower` holds the next
        for y in range(rows):
            first, share = place(y, height / rows, height)
            if first == held + 1:
                upper, lower = lower, upper
            elif first != held:
                interpolate_row(image[top + first], left, firsts, shares, upper)
            if first != held:
                interpolate_row(image[top + min(first + 1, height - 1)], left, firsts, shares, lower)
                held = first
            line = out[y].reshape(-1)
            for x in range(3 * columns):
                line[x] = np.uint8(upper[x] + share * (lower[x] - upper[x]) + np.float32(0.5))

    return enlarge


@functools.cache
def decoding_loop() -> Callable[..., int]:
    """The decoding of some images, compiled once a process; it runs without the interpreter's lock.

    storage: uint8 (n,), the file.  offsets, sizes, heights, widths: int64 (N,).  is_jpeg: bool (N,).
    index: int64 (K,).  boxes: int32 (K, 4).  images: uint8 (K, h, w, 3), overwritten.  scratch: uint8, overwritten,
        long enough for any stored image of the split.
    Returns the place in `index` of the first image whose JPEG is damaged or of another size, else -1.
    """
    with keep_torch_threads():
        from ffcv.libffcv import imdecode, memcpy, resize_crop
        from numba import njit

    def compiled(function: Callable) -> Callable[..., Any]:
        return cast("Callable[..., Any]", njit(function, nogil=True, error_model="numpy"))  # numba's stubs deny that

    decode_c, resize_c, copy_c = compiled(imdecode), compiled(resize_crop), compiled(memcpy)
    size_of, enlarge = compiled(jpeg_size), enlarging()

    @compiled
    def loop(storage, offsets, sizes, is_jpeg, heights, widths, index, boxes, images, scratch):
        for k in range(len(index)):
            i = index[k]
            height, width = heights[i], widths[i]
            top, left, crop_height, crop_width = boxes[k, 0], boxes[k, 1], boxes[k, 2], boxes[k, 3]
            data = storage[offsets[i] : offsets[i] + sizes[i]]
            whole = crop_height == height and crop_width == width
            as_stored = whole and height == images.shape[1] and width == images.shape[2]
            if is_jpeg[i]:
                found = size_of(data)
                if found[0] != height or found[1] != width:
                    return k
                image = images[k] if as_stored else scratch[: 3 * height * width].reshape(height, width, 3)
                if decode_c(data, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                    return k
            else:
                image = data.reshape(height, width, 3)
            if not as_stored and (crop_height < images.shape[1] or crop_width < images.shape[2]):
                enlarge(image, top, left, crop_height, crop_width, images[k])
            elif not as_stored:
                resize_c(image, top, top + crop_height, left, left + crop_width, images[k])
            elif not is_jpeg[i]:
                copy_c(image, images[k])
        return NONE_DAMAGED

    return loop


def resize_crop(image: np.ndarray, box: Sequence[int], out: np.ndarray) -> None:
    """Writes the rectangle `box` of `image`, resized, into `out`: by area where it shrinks, else as `enlarging` does.

    image: uint8 (H, W, 3), contiguous.  box: (top, left, height, width).  out: uint8 (h, w, 3), contiguous,
        overwritten.
    """
    top, left, height, width = (int(value) for value in box)
    if (height, width) == out.shape[:2]:
        out[:] = image[top : top + height, left : left + width]
    elif height >= out.shape[0] and width >= out.shape[1]:
        kernels().resize_crop(image, top, top + height, left, left + width, out)
    else:
        enlarging()(image, top, left, height, width, out)
