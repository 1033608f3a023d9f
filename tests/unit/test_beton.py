"""Reading .beton files image by image, and refusing those that are not whole."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from small_betons import SmallDataset, mixed_shapes, write_small

from loaders.stored.beton import HEADER, Beton


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("raw") / "train.beton", mixed_shapes(9), "raw")


@pytest.fixture(scope="module")
def jpg(tmp_path_factory) -> SmallDataset:
    return write_small(tmp_path_factory.mktemp("jpg") / "train.beton", mixed_shapes(9), "jpg")


def test_raw_images_and_labels_are_what_was_written(raw):
    beton = Beton.open(raw.path)
    assert len(beton) == 9
    assert beton.shape is None
    assert not beton.is_jpeg.any()
    np.testing.assert_array_equal(beton.labels, raw.split_labels)
    for i, image in enumerate(raw.images):
        np.testing.assert_array_equal(beton.image(i), image)


def test_jpeg_images_are_stored_as_jpeg_and_come_back_close(jpg):
    beton = Beton.open(jpg.path)
    assert beton.is_jpeg.all()
    for i, image in enumerate(jpg.images):
        assert beton.encoded(i)[:2].tobytes() == b"\xff\xd8"
        assert np.abs(beton.image(i).astype(np.int64) - image).mean() < 6


def test_a_beton_travels_to_another_process_as_its_path(raw):
    beton = Beton.open(raw.path)
    pickled = pickle.dumps(beton)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).image(4), beton.image(4))


def test_files_that_are_not_whole_betons_are_refused(raw, tmp_path):
    with pytest.raises(ValueError, match=r"absent.beton does not exist: convert"):
        Beton.open(tmp_path / "absent.beton")

    cut = tmp_path / "cut.beton"
    for missing, message in [(1000, "cut short"), (24, "allocation table misses images"), (10**9, "shorter than")]:
        cut.write_bytes(raw.path.read_bytes()[:-missing])
        with pytest.raises(ValueError, match=message):
            Beton.open(cut)

    unfinished = tmp_path / "unfinished.beton"
    shutil.copy(raw.path, unfinished)
    header = np.memmap(unfinished, dtype=HEADER, mode="r+", shape=1)
    header["allocation_table"] = 0
    header.flush()
    with pytest.raises(ValueError, match="did not finish"):
        Beton.open(unfinished)

    picture = tmp_path / "picture.beton"
    picture.write_bytes(b"\x89PNG" * 100)
    with pytest.raises(ValueError, match="format version"):
        Beton.open(picture)
