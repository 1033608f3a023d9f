"""Pixels of images that were never converted are those that evaluation reads of the converted ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt.inference.transform import EvaluationTransform
from loaders.factory import format_read, make_loader
from loaders.order.crop import CropSpec
from loaders.readers import BACKENDS
from loaders.sources import open_source
from loaders.sources.decode import read_image_file
from loaders.stored.as_stored import Storage, cut, pillow_pixels
from loaders.stored.convert import convert
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.ffcv_kernels import decode_jpeg
from loaders.stored.image_header import jpeg_size
from loaders.stored.unconverted import UnconvertedDataset

CROP = CropSpec("center", 24)
SIZES = ((40, 60), (61, 47), (33, 33), (50, 90))


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours with some noise: what JPEG is made for, and still different everywhere."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (2, 3, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of photographs of several sizes: JPEG files, one that its EXIF block turns, one gray, and a PNG."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in (("train", 6), ("val", 4), ("test", 6)):
        for label, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for k in range(count):
                seed = 1000 * label + 100 * len(split) + k
                image = Image.fromarray(photograph(*SIZES[k % 4], seed))
                path = root / split / name / f"{k}.jpg"
                if k == 0:
                    exif = Image.Exif()
                    exif[0x0112] = 6
                    image.save(path, quality=95, exif=exif)
                elif k == 1:
                    image.convert("L").save(path, quality=95)
                elif k == 2:
                    image.save(path.with_suffix(".png"))
                else:
                    image.save(path, quality=95)
    return root


def source(folder: Path):
    return open_source("image_folder", root=folder, meta_per_class=4)


def evaluated(dataset, backend: str) -> tuple[np.ndarray, str | None]:
    """The test images as evaluation gets them, uint8 (N, 24, 24, 3), and the format that they were read in."""
    options = {"backend": backend, "batch_size": 12, "device": "cpu", "train": False, "crop": CROP}
    options["num_workers"] = int(backend != "torch")  # which starts processes for others than 0
    loader = make_loader(dataset, "test", **options)
    try:
        (batch,) = list(loader.epoch(0))
    finally:
        loader.close()
    return batch.images.permute(0, 2, 3, 1).numpy(), format_read(dataset, backend)


def from_files(folder: Path, storage: Storage) -> np.ndarray:
    split = source(folder).splits["test"]
    out = np.empty((len(split.paths), 24, 24, 3), dtype=np.uint8)
    for path, pixels in zip(split.paths, out, strict=True):
        cut(storage.pixels(read_image_file(folder / path)), CROP, pixels)
    return out


@pytest.mark.parametrize("size", [None, 36], ids=["own", "scaled"])
@pytest.mark.parametrize("mode", ["raw", "jpg"])
def test_files_give_the_pixels_of_the_converted_images(folder, tmp_path, mode, size):
    """Equal where nothing was encoded a second time; else apart by what JPEG of quality 90 loses.

    Encoded again in mode jpg is what is scaled, turned or no JPEG.
    """
    options = FfcvOptions(mode, max_resolution=size, num_workers=1)
    request, formats = options.parameters(), ("ffcv", "dali")
    dataset = convert(source(folder), tmp_path / "out", options=options, request=request, formats=formats)
    for backend in ("resident", "resident_jpeg"):
        pixels, kind = evaluated(dataset, backend)
        assert kind == {"resident": "ffcv", "resident_jpeg": "dali"}[backend]
        storage = Storage.of(dataset, kind)
        assert storage == Storage(mode == "jpg" or kind == "dali", size)
        difference = np.abs(from_files(folder, storage).astype(int) - pixels)
        if mode == "raw":
            assert not difference.any()
        else:
            assert difference.mean() <= 3
            assert difference.max() <= 80
            kept = [not of_image.any() for of_image in difference]
            assert sum(kept) == (0 if size else 8) or kind == "ffcv"


@pytest.mark.parametrize("backend", ["torch", "resident"])
def test_files_give_the_pixels_of_a_source_that_is_read_as_it_is(folder, backend):
    assert "source" in str(BACKENDS[backend].reads)
    dataset = UnconvertedDataset.open(source(folder), folder, num_workers=1, progress=False)
    pixels, kind = evaluated(dataset, backend)
    np.testing.assert_array_equal(from_files(folder, Storage.of(dataset, str(kind))), pixels)


def test_an_image_of_pillow_is_read_as_its_file(folder):
    for name in ("test/ant/0.jpg", "test/ant/1.jpg", "test/ant/2.png", "test/ant/3.jpg"):
        with Image.open(folder / name) as image:
            expected = Storage().pixels(read_image_file(folder / name))
            np.testing.assert_array_equal(pillow_pixels(image), expected)


def test_a_damaged_file_has_one_reason_however_it_is_stored(folder, tmp_path):
    whole = (folder / "test/ant/3.jpg").read_bytes()
    for data, reason in ((whole[: len(whole) // 2], "damaged|truncated"), (b"\xff\xd8 nothing", "not an image")):
        for storage in (Storage(), Storage(keeps_jpeg=True), Storage(keeps_jpeg=True, max_resolution=30)):
            with pytest.raises(ValueError, match=reason):
                storage.pixels(data)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(ValueError, match="damaged"):
        pillow_pixels(image)


@pytest.mark.parametrize("size", [None, 36], ids=["own", "scaled"])
def test_images_decoded_in_one_compiled_call_have_the_pixels_of_each_decoded_alone(folder, tmp_path, monkeypatch, size):
    """Damaged files in between, one that FFCV's decoder refuses and Pillow reads, other formats, and pixels."""
    whole = (folder / "test/ant/3.jpg").read_bytes()
    flawed = whole[:-2] + b"\0" * 40 + whole[-2:]  # libjpeg warns of what lies before the end of the image
    (tmp_path / "flawed.jpg").write_bytes(flawed)
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    images = sorted((folder / "test").rglob("*.*g"))
    images[2:2] = [tmp_path / "cut.jpg", tmp_path / "flawed.jpg", tmp_path / "missing.jpg", photograph(30, 40, 1)]
    storage = Storage(keeps_jpeg=True, max_resolution=size)
    transform = EvaluationTransform(24, CROP, storage, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="damaged"):
        decode_jpeg(np.frombuffer(flawed, dtype=np.uint8), *jpeg_size(flawed))
    alone, together = (np.zeros((len(images), 24, 24, 3), dtype=np.uint8) for _ in range(2))
    failed = transform.write(images, alone)
    monkeypatch.setattr("fastlt.inference.transform.JPEG_BYTES", 3 * len(whole))  # in more calls than one
    assert sorted(transform.write(images, together, compiled=True)) == failed
    assert [place for place, _ in failed] == [2, 4]
    kept = np.delete(np.arange(len(images)), [2, 4])
    np.testing.assert_array_equal(together[kept], alone[kept])
