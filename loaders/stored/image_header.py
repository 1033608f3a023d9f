"""The size of an image from the first bytes of its file, without a decoder."""

from __future__ import annotations

from collections.abc import Sequence

PNG_START = b"\x89PNG\r\n\x1a\n"


def jpeg_size(data: Sequence[int]) -> tuple[int, int]:
    """(height, width) from the frame header of a JPEG file, (0, 0) where it has none.

    data: anything that gives bytes by position. `loaders.stored.ffcv_kernels` compiles this function, too.
    Source: ITU T.81, B.1.1 and B.2.2.
    """
    end, at = len(data), 2
    while at + 9 <= end:
        if int(data[at]) != 0xFF:
            at += 1
            continue
        marker = int(data[at + 1])
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            return 256 * int(data[at + 5]) + int(data[at + 6]), 256 * int(data[at + 7]) + int(data[at + 8])
        if marker == 0xD9 or marker == 0xDA:  # the end of the image, or its coded pixels
            return 0, 0
        if marker == 0x00 or marker == 0xFF:  # no marker, or one of the fill bytes before one
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            at += 2
        else:
            at += 2 + 256 * int(data[at + 2]) + int(data[at + 3])
    return 0, 0


def png_size(data: memoryview) -> tuple[int, int]:
    """(height, width) from the header of a PNG file, (0, 0) where it has none."""
    if bytes(data[:8]) != PNG_START or bytes(data[12:16]) != b"IHDR" or len(data) < 24:
        return 0, 0
    return int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def encoded_size(data: memoryview) -> tuple[int, int]:
    """(height, width) from the header of a JPEG or PNG file, (0, 0) where there is none."""
    return jpeg_size(data) if bytes(data[:2]) == b"\xff\xd8" else png_size(data)
