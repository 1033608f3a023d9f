"""Mode jpg: which JPEG files are stored as they are, the same in both formats, and that every reader sees one image."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_betons import EVERY_BACKEND, smooth_images

from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.sources import FileSplit, Source
from loaders.sources.decode import decode_bytes, plain_jpeg
from loaders.stored.convert import convert
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions

HEIGHT, WIDTH = 40, 56
PICTURE = smooth_images([(HEIGHT, WIDTH)], seed=3)[0]


def saved(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(mode: str = "RGB", **options) -> bytes:
    return saved(Image.fromarray(PICTURE).convert(mode), **{"quality": 92, **options})


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return jpeg(exif=exif)


def as_rgb() -> bytes:
    """The components of a JPEG called R, G and B and no JFIF marker: decoders then take them for these colours."""
    data = bytearray(jpeg(keep_rgb=True, subsampling=0))
    return bytes(data)


def without_jfif() -> bytes:
    data = jpeg()
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + data[4 + int.from_bytes(data[4:6], "big") :]


def flawed() -> bytes:
    """Bytes too many before the end: Pillow takes them, libjpeg warns."""
    data = jpeg()
    return data[:-2] + bytes(56) + data[-2:]


KEPT: dict[str, Callable[[], bytes]] = {
    "baseline": jpeg,
    "quality 30": lambda: jpeg(quality=30),
    "4:4:4": lambda: jpeg(subsampling=0),
    "4:2:2": lambda: jpeg(subsampling=1),
    "progressive": lambda: jpeg(progressive=True),
    "gray": lambda: jpeg("L"),
    "restart markers": lambda: jpeg(restart_marker_blocks=2),
    "without JFIF": without_jfif,
    "something behind its end": lambda: jpeg() + b"what some cameras append",
    "a colour profile": lambda: jpeg(icc_profile=b"profile" * 100),
}
ENCODED_ANEW: dict[str, Callable[[], bytes]] = {
    "CMYK": lambda: jpeg("CMYK"),
    "turned by EXIF": turned,
    "colours as RGB": as_rgb,
    "flawed": flawed,
    "PNG": lambda: saved(Image.fromarray(PICTURE), "PNG"),
    "100 kB beside the pixels": lambda: jpeg(comment=b"x" * 60_000) + b"x" * 40_000,
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[dict[str, bytes], ConvertedDataset]:
    """Every kind of file, small enough to be stored in its own size, and both formats of mode jpg."""
    folder = tmp_path_factory.mktemp("kept")
    contents = {name: make() for name, make in (KEPT | ENCODED_ANEW).items()}
    splits = {}
    for split in ("train", "meta", "test"):
        (folder / split).mkdir()
        for i, data in enumerate(contents.values()):
            (folder / split / f"{i}.jpg").write_bytes(data + split.encode())  # else the splits would hold copies
        paths = [f"{i}.jpg" for i in range(len(contents))]
        splits[split] = FileSplit(folder / split, paths, np.arange(len(paths)) % 2, "made for a test")
    source = Source("image_folder", ("a", "b"), splits)
    options = FfcvOptions("jpg", max_resolution=max(WIDTH, HEIGHT), num_workers=1)
    made = convert(source, folder / "out", options=options, request={}, formats=("ffcv", "dali"), progress=False)
    return {name: data + b"train" for name, data in contents.items()}, made


def test_both_formats_hold_the_same_files_and_those_that_serve_are_the_originals(converted):
    contents, dataset = converted
    beton, shards = (dataset.stored("train", kind) for kind in ("ffcv", "dali"))
    for i, (name, data) in enumerate(contents.items()):
        stored = beton.encoded(i).tobytes()
        assert stored == shards.encoded(i).tobytes(), name
        assert (stored == data) == (name in KEPT), name
        assert stored.startswith(b"\xff\xd8"), name
    assert beton.is_jpeg.all()
    for kind in ("ffcv", "dali"):
        assert dataset.manifest["kept_files"][kind] == dict.fromkeys(("train", "meta", "test"), len(KEPT))


@pytest.mark.parametrize("backend", EVERY_BACKEND)
def test_every_reader_gives_the_pixels_of_the_stored_file(converted, backend):
    contents, dataset = converted
    options = {"batch_size": len(contents), "device": "cpu", "train": False, "num_workers": 1}
    loader = make_loader(dataset, "train", backend=backend, crop=CropSpec("center", 32, ratio=0.8), **options)
    try:
        images = next(iter(loader.epoch(0))).images.permute(0, 2, 3, 1).numpy()
    finally:
        loader.close()
    beton = dataset.stored("train", "ffcv")
    for i, name in enumerate(contents):
        # 0.8 of the shorter side, 40, is 32: the centre without scaling.
        height, width = beton.image(i).shape[:2]
        top, left = (height - 32) // 2, (width - 32) // 2
        np.testing.assert_array_equal(images[i], beton.image(i)[top : top + 32, left : left + 32], err_msg=name)


def test_the_pixels_are_near_those_of_pillow(converted):
    contents, dataset = converted
    for i, (name, data) in enumerate(contents.items()):
        gap = np.abs(dataset.stored("train", "ffcv").image(i).astype(int) - decode_bytes(data))
        assert gap.mean() < (1.5 if name in KEPT else 4), (name, gap.mean())


def test_what_has_to_be_scaled_is_encoded_anew(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    (tmp_path / "1.jpg").write_bytes(saved(Image.fromarray(PICTURE[:30, :30])))
    split = FileSplit(tmp_path, ["0.jpg", "1.jpg"], np.arange(2), "made for a test")
    one = {name: split for name in ("train", "meta", "test")}
    options = FfcvOptions("jpg", max_resolution=32, num_workers=1)
    source = Source("image_folder", ("a", "b"), one)
    made = convert(source, tmp_path / "out", options=options, request={}, allow_duplicates=True, progress=False)
    beton = made.stored("train", "ffcv")
    assert beton.encoded(0).tobytes() != (tmp_path / "0.jpg").read_bytes()
    assert (beton.heights.tolist(), beton.widths.tolist()) == ([23, 30], [32, 30])
    assert beton.encoded(1).tobytes() == (tmp_path / "1.jpg").read_bytes()


def test_raw_and_proportion_store_no_originals_in_a_beton(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg())
    split = FileSplit(tmp_path, ["0.jpg"] * 2, np.arange(2), "made for a test")
    source = Source("image_folder", ("a", "b"), {name: split for name in ("train", "meta", "test")})
    for mode in ("raw", "proportion"):
        options = FfcvOptions(mode, num_workers=1)
        made = convert(source, tmp_path / mode, options=options, request={}, allow_duplicates=True, progress=False)
        beton = made.stored("train", "ffcv")
        assert all(beton.encoded(i).tobytes() != jpeg() for i in range(2))
        assert made.manifest["kept_files"] == {"ffcv": {"train": 0, "meta": 0, "test": 0}}
    np.testing.assert_array_equal(
        ConvertedDataset.open(tmp_path / "raw").stored("train", "ffcv").image(0), decode_bytes(jpeg())
    )


@pytest.mark.parametrize("frame", [0xC3, 0xC9, 0xCA])
def test_lossless_and_arithmetic_coding_are_not_kept(frame):
    data = jpeg()
    at = data.index(b"\xff\xc0")
    assert plain_jpeg(data) == data
    assert plain_jpeg(data[: at + 1] + bytes([frame]) + data[at + 2 :]) is None


def test_truncated_files_are_no_plain_jpegs(tmp_path):
    for share in (0.02, 0.1, 0.5):
        data = jpeg()
        cut = data[: int(len(data) * share)]
        with pytest.raises(ValueError, match=r"damaged|not an image"):
            decode_bytes(cut)
    assert plain_jpeg(b"\xff\xd8") is None
    assert plain_jpeg(b"") is None


def test_real_small_jpegs_keep_their_bytes(real_data, tmp_path):
    root: Path = real_data("tiny100_lt") / "images" / "train"
    paths = sorted(str(path.relative_to(root)) for path in root.glob("*/*.JPEG"))[:300]
    split = FileSplit(root, paths, np.arange(len(paths)) % 2, "real")
    source = Source("image_folder", ("a", "b"), {name: split for name in ("train", "meta", "test")})
    options = FfcvOptions("jpg", num_workers=2)
    made = convert(
        source,
        tmp_path / "out",
        options=options,
        request={},
        formats=("ffcv", "dali"),
        allow_duplicates=True,
        progress=False,
    )
    beton, shards = (made.stored("train", kind) for kind in ("ffcv", "dali"))
    kept = 0
    for i, path in enumerate(paths):
        assert beton.encoded(i).tobytes() == shards.encoded(i).tobytes()
        kept += beton.encoded(i).tobytes() == (root / path).read_bytes()
    assert kept > 290
    assert {of["train"] for of in made.manifest["kept_files"].values()} == {kept}
