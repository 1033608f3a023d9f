"""Damaged image files: each is refused by name, or decodes; none ends or holds up the process that reads it."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.sources import FileSplit, Source
from loaders.stored.beton import Beton
from loaders.stored.convert import convert
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.image_check import check_images

FORMATS = {
    "jpg": {"format": "JPEG", "quality": 90},
    "progressive.jpg": {"format": "JPEG", "progressive": True},
    "png": {"format": "PNG"},
    "gif": {"format": "GIF"},
    "bmp": {"format": "BMP"},
    "tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "webp": {"format": "WEBP"},
    "ppm": {"format": "PPM"},
    "jp2": {"format": "JPEG2000"},
    "tga": {"format": "TGA"},
}
DAMAGES = ("truncated", "zeroed", "flipped", "noise", "spliced", "no image", "header", "huge", "empty")
# Damage that leaves no whole image, in these formats: such a file must be refused.
CHECKED = {
    ("truncated", "jpg"), ("truncated", "progressive.jpg"), ("truncated", "png"), ("truncated", "bmp"),
    ("truncated", "ppm"), ("truncated", "webp"), ("flipped", "png"),
}  # fmt: skip
ALWAYS = {"no image", "huge", "empty"}
TIMEOUT_S = 60.0


def encoded(draw: random.Random, kind: str, size: tuple[int, int] = (48, 40)) -> bytes:
    pixels = np.random.default_rng(draw.randrange(1 << 30)).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **FORMATS[kind])
    return file.getvalue()


def damaged(draw: random.Random, kind: str, damage: str) -> bytes:
    data = bytearray(encoded(draw, kind))
    start = draw.randrange(len(data))
    end = min(len(data), start + draw.randint(1, len(data)))
    if damage == "truncated":
        return bytes(data[: draw.randrange(1, len(data) * 9 // 10)])
    if damage == "zeroed":
        data[start:end] = bytes(end - start)
    elif damage == "noise":
        data[start:end] = draw.randbytes(end - start)
    elif damage == "flipped":
        for _ in range(draw.randint(1, 20)):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif damage == "spliced":
        data[start:] = encoded(draw, draw.choice([*FORMATS]))[start:]
    elif damage == "header":
        data[draw.randrange(min(64, len(data)))] = draw.randrange(256)
    elif damage == "huge":
        return huge(draw)
    elif damage == "no image":
        return draw.choice([b"<html>404</html>", b"\x1f\x8b\x08\0" + draw.randbytes(90), b"%!PS\n", b"\0" * 300, b"\n"])
    elif damage == "empty":
        return b""
    return bytes(data)


def huge(draw: random.Random) -> bytes:
    """A small file whose header claims 65,535 x 65,535 pixels."""
    side = 65535
    kind = draw.choice(["png", "bmp", "gif", "ppm", "jpg"])
    data = bytearray(encoded(draw, kind))
    if kind == "png":
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data[12:33] = header + struct.pack(">I", zlib.crc32(header))
    elif kind == "bmp":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "gif":
        data[6:10] = struct.pack("<HH", side, side)
    elif kind == "ppm":
        return b"P6\n%d %d\n255\n" % (side, side) + bytes(data[-600:])
    else:
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", side, side)
    return bytes(data)


def damaged_split(folder: Path, count: int, seed: int) -> FileSplit:
    """So many damaged images, each kind of damage and each format in turn, every tenth one whole."""
    draw = random.Random(seed)
    folder.mkdir()
    paths = []
    for i in range(count):
        kind, damage = [*FORMATS][i % len(FORMATS)], DAMAGES[i // len(FORMATS) % len(DAMAGES)]
        if i % 11 == 10:
            damage = "whole"
        data = encoded(draw, kind) if damage == "whole" else damaged(draw, kind, damage)
        paths.append(f"{i:05d}-{damage}.{kind}")
        (folder / paths[-1]).write_bytes(data)
    return FileSplit(folder, paths, np.arange(count) % 2, "damaged")


def damage_of(path: str) -> tuple[str, str]:
    """(damage, format) of a file of `damaged_split`."""
    name, _, kind = path.partition(".")
    return name.partition("-")[2], kind


def problems_of(split: FileSplit, bad: dict[int, str]) -> list[str]:
    """Images that are whole and refused, or cannot be whole and accepted, or refused without a reason."""
    problems = []
    for i, path in enumerate(split.paths):
        damage = damage_of(path)
        if i in bad and (damage[0] == "whole" or len(bad[i]) < 8 or len(bad[i]) > 300):
            problems.append(f"{path} is refused: {bad[i]}")
        if i not in bad and (damage[0] in ALWAYS or damage in CHECKED):
            problems.append(f"{path} is accepted")
    return problems


def test_some_damaged_images_are_refused_by_name(tmp_path):
    split = damaged_split(tmp_path / "images", 180, seed=1)
    check = check_images(split, num_workers=1, timeout_s=TIMEOUT_S)
    assert [image.name for image in check.bad] == [split.name(image.index) for image in check.bad]
    assert problems_of(split, {image.index: image.reason for image in check.bad}) == []


@pytest.mark.faults
def test_every_damaged_image_is_refused_by_name_or_decodes(tmp_path, rounds, fault_seed, report_figure):
    """Checked, and then converted with those left out that cannot be decoded."""
    count = rounds(1800)
    split = damaged_split(tmp_path / "images", count, fault_seed)
    check = check_images(split, num_workers=2, timeout_s=TIMEOUT_S)
    bad = {image.index: image.reason for image in check.bad}
    problems = problems_of(split, bad)
    outcomes = Counter("whole" if damage_of(path)[0] == "whole" else i in bad for i, path in enumerate(split.paths))

    one = split.subset(np.array([10, 21]))
    source = Source("damaged", ("a", "b"), {"train": split, "meta": one, "test": one})
    dataset = convert(
        source, tmp_path / "out", options=FfcvOptions(num_workers=2), request={}, on_error="skip",
        allow_duplicates=True, progress=False,
    )  # fmt: skip
    skipped = [line.split("\t")[1] for line in (tmp_path / "out" / "skipped.txt").read_text().splitlines()]
    if skipped != [split.name(i) for i in sorted(bad)]:
        problems.append("skipped.txt does not list the images that were refused")
    stored = Beton(dataset.beton("train"))
    for k, i in enumerate(check.good):
        if not np.array_equal(stored.image(k), split.image(i)):
            problems.append(f"{split.paths[i]} is stored as another image")
    report_figure(
        f"{outcomes[True] + outcomes[False]:,} damaged images: {outcomes[True]:,} refused by name, "
        f"{outcomes[False]:,} decode and are stored as they decode, {len(problems)} otherwise; "
        f"{outcomes['whole']:,} whole ones accepted"
    )
    assert problems == []
