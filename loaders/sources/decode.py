"""One image file to RGB uint8, strictly: what cannot be decoded whole is an error, never a grey rectangle.

Pillow and not OpenCV, because Pillow raises on a truncated file (OpenCV fills the missing rows and says nothing), knows
the inverted CMYK that Adobe writes into JPEGs, and goes by the file's content, not by its extension.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from loaders.sources.messages import readable_bytes

# A list, so that nothing is ever handed to a format whose reader starts another program (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA")
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".jp2", ".tga", ".jfif")
)
MAX_PIXELS = 178_956_970  # Pillow's own limit of what may be decoded: 0.5 GiB of RGB
MAX_BYTES = 1 << 31  # of a file that is read
ORIENTATION_TAG = 0x0112
TIFF_SIZE = (0x0100, 0x0101)  # tags of width and height
# How JPEG, PNG, GIF, TIFF and JPEG 2000 begin; BMP, PPM and TGA have too little that is theirs alone.
SIGNATURES = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\xff\x4f\xff\x51",
)
SCAN, END_OF_IMAGE = 0xDA, b"\xff\xd9"  # JPEG: the marker before the compressed pixels, and the last one
PILLOW = r"PIL\."  # its modules
OF_PILLOW = ("ignore", None, Warning, re.compile(PILLOW), 0)  # the filter of warnings that `quiet_pillow` sets
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended sequential and progressive


def decode_image(path: Path) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3) RGB: `read_image_file` and `decode_bytes`."""
    return decode_bytes(read_image_file(path))


def read_image_file(path: Path) -> bytes:
    """The bytes of an image file, at least one; ValueError with the reason, without the path, when there are none."""
    try:
        if not path.is_file() and path.exists():  # to open a pipe would wait for ever
            raise ValueError("not a file (a folder, a pipe or a device)")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(
                f"{readable_bytes(size)} are more than the {readable_bytes(MAX_BYTES)} allowed for an image"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except PermissionError:
        raise ValueError("no permission to read it") from None
    except MemoryError:
        raise ValueError("not enough memory to read it") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    if not data:
        raise ValueError("the file is empty (0 bytes)")
    return data


def decode_bytes(data: bytes) -> np.ndarray:
    """The image of a file's bytes as uint8 (H, W, 3) RGB, upright.

    Grayscale is repeated over the channels, 16-bit gray is scaled (65535 becomes 255), CMYK and palettes are converted,
    an alpha channel is dropped (as torchvision's folder reader does, so that pixels agree with published pipelines),
    the EXIF orientation is applied, and of an animation the first frame is taken.
    Raises ValueError with the reason when they are no whole image.
    """
    quiet_pillow()
    with reasons(), _open(io.BytesIO(data)) as image:
        _check_pixels(image)
        image.load()
        if image.format in ("JPEG", "MPO") and not has_end(data):
            raise ValueError("damaged: its end is missing or overwritten (no end-of-image marker)")
        return upright_rgb(image)


def quiet_pillow() -> None:
    """Ignore what Pillow warns of, broken EXIF blocks and palettes: the pixels are what counts here.

    For good: `warnings.catch_warnings` in several threads at once leaves its filter behind, which was for all warnings.
    """
    if warnings.filters[:1] != [OF_PILLOW]:
        warnings.filterwarnings("ignore", module=PILLOW)


def header_size(file: IO[bytes]) -> tuple[int, int]:
    """(height, width) of the image that `decode_bytes` would give, by its header alone.

    Pillow may warn of broken EXIF blocks. Raises ValueError with the reason when the header cannot be read.
    """
    with reasons(), _open(file) as image:
        _check_pixels(image)
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow have turned the size already
            tags: Mapping[int, int] = vars(image)["tag_v2"]
            width, height = (int(tags[tag]) for tag in TIFF_SIZE)
        elif "exif" not in image.info:  # Pillow would decode a PNG in search of an EXIF block behind its pixels
            return height, width
        return (width, height) if 5 <= _orientation(image) <= 8 else (height, width)


def _check_pixels(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are more than the {MAX_PIXELS:,} allowed")


@contextmanager
def reasons() -> Iterator[None]:
    """Pillow's errors inside become a ValueError with the reason."""
    try:
        yield
    except ValueError:
        raise
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ValueError(f"more pixels than the {MAX_PIXELS:,} allowed") from None
    except MemoryError:
        raise ValueError("not enough memory to decode it") from None
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, IndexError, … on damaged files
        raise ValueError(f"damaged: {error or type(error).__name__}") from None


def plain_jpeg(data: bytes) -> bytes | None:
    """The bytes when they are a JPEG that any decoder shows as `decode_bytes` does, else None.

    None for other formats, for CMYK, for a JPEG that holds RGB instead of luminance and chrominance or that its EXIF
    block turns, and for arithmetic coding and lossless JPEG: not every reader shows these, or shows them the same.
    """
    if not data.startswith(b"\xff\xd8") or not _is_common_jpeg(data):
        return None
    quiet_pillow()
    with _open(io.BytesIO(data)) as image:
        plain = image.mode in ("RGB", "L") and _orientation(image) == 1
    return data if plain else None


def _is_common_jpeg(data: bytes) -> bool:
    """Whether the frame of a JPEG is Huffman-coded, sequential or progressive, and its colours are YCbCr or gray.

    Source: ITU T.81, B.1.1 and B.2.2; for the colours, the rules of libjpeg.
    """
    has_jfif, transform = False, None
    for marker, _, segment in _segments(data):
        if marker == 0xE0 and segment.startswith(b"JFIF"):
            has_jfif = True
        elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
            transform = segment[11]
        elif marker in FRAMES:
            components = segment[6::3]
            if marker not in HUFFMAN_FRAMES or len(components) not in (1, 3):
                return False
            is_rgb = transform == 0 or (transform is None and not has_jfif and components == b"RGB")
            return len(components) == 1 or not is_rgb
    return False


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The marker, its place and the content of each segment of JPEG bytes; the last is the first scan, left empty."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        yield marker, place, b"" if marker == SCAN else data[place + 4 : place + 2 + length]
        if marker == SCAN:
            return
        place += 2 + length


def looks_like_image(path: Path) -> bool:
    """Whether a file begins as image files do, those of formats that cannot be read here among them."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return False
    # RIFF holds sound and films, too, and so does the box "ftyp", with which HEIF and AVIF begin.
    if start[:4] == b"RIFF":
        return start[8:12] == b"WEBP"
    if start[4:8] == b"ftyp":
        return start[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")
    return start.startswith(SIGNATURES)


def has_end(data: bytes) -> bool:
    """Whether an end-of-image marker follows the first scan of JPEG bytes; within a scan no other bytes look like it.

    Pillow asks for none when what lies in the place of the missing data, zeros of a broken download say, can be taken
    for the rest of the image. A thumbnail has an end of its own, before the scan.
    """
    places = [place for _, place, _ in _segments(data)]
    return data.rfind(END_OF_IMAGE, places[-1] if places else 2) >= 0


def _open(file: IO[bytes]) -> Image.Image:
    Image.init()  # Pillow registers the rarer formats late, and a list of formats must name registered ones
    return Image.open(file, formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) when there is none; an EXIF block that cannot be parsed holds none."""
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # the parser's errors on damaged blocks are of many types
        return 1


def upright_rgb(image: Image.Image) -> np.ndarray:
    """An opened image as `decode_bytes` gives it: uint8 (H, W, 3) RGB, upright."""
    return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if 2 <= _orientation(image) <= 8 else image


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):
        gray = _eight_bits(np.asarray(image))
        return np.repeat(gray[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("a floating-point image, whose white is unknown: convert it to 8 or 16 bits first")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the palette entry that is transparent may be of any type; RGBA settles it
    return np.ascontiguousarray(np.asarray(image if image.mode == "RGB" else image.convert("RGB")))


def _eight_bits(gray: np.ndarray) -> np.ndarray:
    """Integers 0..65535 to uint8, rounded; a plain conversion would clip everything above 255 to white."""
    gray = gray.astype(np.int64)
    if gray.size and (gray.min() < 0 or gray.max() > 65535):
        raise ValueError("a 32-bit image, whose white is unknown: convert it to 8 or 16 bits first")
    return ((gray * 255 + 32767) // 65535).astype(np.uint8)
