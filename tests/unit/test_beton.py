"""Reading .beton files image by image, and refusing those that are not whole."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from small_betons import SmallDataset, mixed_shapes, needs_dali, write_small

from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.stored.beton import ALLOCATION, FIELD, HEADER, SAMPLE, Beton
from loaders.stored.damage import DamageError
from loaders.stored.image_header import encoded_size

BETON_READERS = ["torch", "resident", "ffcv", pytest.param("resident_jpeg", marks=needs_dali)]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("raw") / "train.beton", mixed_shapes(9), "raw")


@pytest.fixture(scope="module")
def jpg(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("jpg") / "train.beton", mixed_shapes(9), "jpg")


def test_raw_images_and_labels_are_what_was_written(raw):
    beton = Beton(raw.path)
    assert len(beton) == 9
    assert beton.shape is None
    assert not beton.is_jpeg.any()
    np.testing.assert_array_equal(beton.labels, raw.split_labels)
    for i, image in enumerate(raw.images):
        np.testing.assert_array_equal(beton.image(i), image)


def test_jpeg_images_are_stored_as_jpeg_and_come_back_close(jpg):
    beton = Beton(jpg.path)
    assert beton.is_jpeg.all()
    for i, image in enumerate(jpg.images):
        assert beton.encoded(i)[:2].tobytes() == b"\xff\xd8"
        assert np.abs(beton.image(i).astype(np.int64) - image).mean() < 6


def test_a_beton_travels_to_another_process_as_its_path(raw):
    beton = Beton(raw.path)
    pickled = pickle.dumps(beton)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).image(4), beton.image(4))


def test_files_that_are_not_whole_betons_are_refused(raw, tmp_path):
    with pytest.raises(ValueError, match=r"absent.beton does not exist: convert"):
        Beton(tmp_path / "absent.beton")

    cut = tmp_path / "cut.beton"
    for missing, message in [(1000, "cut short"), (24, "allocation table misses images"), (10**9, "shorter than")]:
        cut.write_bytes(raw.path.read_bytes()[:-missing])
        with pytest.raises(ValueError, match=message):
            Beton(cut)

    unfinished = tmp_path / "unfinished.beton"
    shutil.copy(raw.path, unfinished)
    header = np.memmap(unfinished, dtype=HEADER, mode="r+", shape=1)
    header["allocation_table"] = 0
    header.flush()
    with pytest.raises(ValueError, match="did not finish"):
        Beton(unfinished)

    picture = tmp_path / "picture.beton"
    picture.write_bytes(b"\x89PNG" * 100)
    with pytest.raises(ValueError, match="format version"):
        Beton(picture)


def mutated(source: SmallDataset, path, **changes: tuple[int, int]) -> Beton:
    """A copy whose record of one image is changed: field=(image, value); `size` is of the allocation table."""
    shutil.copy(source.path, path)
    whole = Beton(path)
    count, records = len(whole), HEADER.itemsize + 2 * FIELD.itemsize
    samples = np.memmap(path, dtype=SAMPLE, mode="r+", offset=records, shape=count)
    table = int(np.memmap(path, dtype=HEADER, mode="r", shape=1)["allocation_table"][0])
    allocations = np.memmap(path, dtype=ALLOCATION, mode="r+", offset=table, shape=count)
    for field, (i, value) in changes.items():
        if field == "label":
            samples["label"][i] = value
        elif field == "size":
            allocations["size"][allocations["sample"] == i] = value
        elif field == "place":  # in both, as a consistent lie
            allocations["data_ptr"][allocations["sample"] == i] = value
            samples["image"]["data_ptr"][i] = value
        else:
            samples["image"][field][i] = value
    samples.flush()
    allocations.flush()
    return Beton(path)


@pytest.mark.parametrize("mode", ["raw", "jpg"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": (3, 0)}, r"image 3 has a side of 0 pixels|image 3 has more or fewer bytes"),
        ({"height": (8, 0)}, "image 8 has a side of 0 pixels"),
        ({"mode": (2, 7)}, "image 2 is neither a JPEG nor raw pixels"),
        ({"data_ptr": (5, 64)}, "its allocation table misses images"),
        ({"place": (5, 64)}, "image 5 lies outside of the file's data"),
        ({"place": (5, 2**63 + 5)}, "image 5 lies outside of the file's data"),
        ({"size": (1, 2**40)}, "image 1 lies outside of the file's data"),
        ({"size": (1, 0)}, "image 1 lies outside of the file's data"),
        ({"size": (1, 2**64 - 1)}, "image 1 lies outside of the file's data"),
        ({"label": (4, -1)}, "image 4 has a negative label"),
    ],
)
def test_a_record_that_cannot_be_right_is_refused_by_number(raw, jpg, tmp_path, mode, changes, message):
    source = raw if mode == "raw" else jpg
    with pytest.raises(DamageError, match=message):
        mutated(source, tmp_path / "a.beton", **changes)


def test_a_raw_image_has_the_bytes_of_its_pixels_and_lies_in_no_other(raw, jpg, tmp_path):
    width = int(Beton(raw.path).widths[3])
    with pytest.raises(DamageError, match="image 3 has more or fewer bytes than pixels"):
        mutated(raw, tmp_path / "a.beton", width=(3, width + 1))
    offsets = Beton(jpg.path).offsets
    with pytest.raises(DamageError, match=r"image \d begins inside of another one"):
        mutated(jpg, tmp_path / "b.beton", place=(3, int(offsets[2]) + 5))


@pytest.mark.parametrize("backend", BETON_READERS)
@pytest.mark.parametrize("change", [{"width": 1}, {"width": 40}, {"height": -1}, {"height": 60_000}])
def test_a_jpeg_of_another_size_never_reaches_a_decoder(jpg, tmp_path, backend, change):
    """Its header is compared with the record: the decoder would leave pixels unwritten."""
    beton = Beton(jpg.path)
    ((side, more),) = change.items()
    stored = {"width": beton.widths, "height": beton.heights}[side]
    changes = {side: (4, int(min(stored[4] + more, 65_535)))}
    path = tmp_path / "a.beton"
    mutated(jpg, path, **changes)
    dataset = SmallDataset(path, jpg.images, jpg.split_labels, formats=("ffcv",))
    arguments = {"batch_size": 3, "device": "cpu", "train": False, "num_workers": 1, "crop": CropSpec("center", 24)}
    with pytest.raises(DamageError, match=r"a.beton, image 4: .*header says"):
        list(make_loader(dataset, "train", backend=backend, **arguments).epoch(0))


def test_the_size_in_a_header_is_found_as_decoders_find_it(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 61, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for options in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(60_000)}, {"comment": b"\xff\xc0" * 9}):
        picture.save(tmp_path / "a.jpg", **options)
        assert encoded_size(memoryview((tmp_path / "a.jpg").read_bytes())) == (37, 61), options
    picture.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    assert encoded_size(memoryview(data)) == (37, 61)
    assert encoded_size(memoryview(data[:20])) == (0, 0)
    data = (tmp_path / "a.jpg").read_bytes()
    for end in range(0, 170, 3):
        assert encoded_size(memoryview(data[:end])) in ((0, 0), (37, 61))
    filled = data[:2] + b"\xff\xff" + data[2:]  # fill bytes before a marker
    assert encoded_size(memoryview(filled)) == (37, 61)
