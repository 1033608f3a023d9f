"""Which images a data set holds: the same wherever it lies, another when a class, an image or a pixel is."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_betons import smooth_images

from loaders.sources import FileSplit, Source
from loaders.stored import dataset as stored_dataset
from loaders.stored.beton import Beton
from loaders.stored.convert import convert
from loaders.stored.damage import DamageError
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.identity import DatasetIdentity, content_sha256
from loaders.stored.unconverted import UnconvertedDataset

NAMES = ("ant", "bee", "cat")


@pytest.fixture
def source(tmp_path) -> Source:
    return make_source(tmp_path / "images")


def make_source(root: Path, names: tuple[str, ...] = NAMES, train: int = 12) -> Source:
    """PNGs: 12 train, 4 meta and 6 test images of three classes."""
    splits = {}
    for name, count in {"train": train, "meta": 4, "test": 6}.items():
        (root / name).mkdir(parents=True)
        paths = [f"{name}/{i}.png" for i in range(count)]
        for path, image in zip(paths, smooth_images([(8, 8)] * count, seed=count), strict=True):
            Image.fromarray(image).save(root / path)
        splits[name] = FileSplit(root, paths, np.arange(count) % len(names), "made for a test")
    return Source("image_folder", names, splits)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The same images converted twice, to both formats and to DALI's alone."""
    root = tmp_path_factory.mktemp("identity")
    source, options = make_source(root / "images"), FfcvOptions(num_workers=1)
    for name, formats in {"both": ("ffcv", "dali"), "dali": ("dali",)}.items():
        convert(source, root / name, options=options, request={}, formats=formats, progress=False)
    return root / "both", root / "dali"


@pytest.fixture
def here(folders, tmp_path) -> ConvertedDataset:
    """A copy of both formats, its files' times and all."""
    return ConvertedDataset.open(shutil.copytree(folders[0], tmp_path / "here"))


def unconverted(source: Source) -> UnconvertedDataset:
    return UnconvertedDataset.open(source, source.splits["train"].root, num_workers=1, progress=False)


def large(monkeypatch) -> None:
    """From here on every data set counts as one that is not read at every start."""
    monkeypatch.setattr(stored_dataset, "SMALL_BYTES", 0)


def zero_pixels(path: Path, *, keep_time: bool = False) -> None:
    """Overwrite image 4 of a .beton file."""
    beton, status = Beton(path), path.stat()
    data = bytearray(path.read_bytes())
    data[beton.offsets[4] : beton.offsets[4] + 30] = bytes(30)
    path.write_bytes(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_same_images_converted_again_are_the_same_data(folders):
    both, dali = (ConvertedDataset.open(folder).identity() for folder in folders)
    assert both.differences(dali) == dali.differences(both) == []
    assert DatasetIdentity.from_tree(both.to_tree()) == both
    ffcv = replace(both, contents={"ffcv": both.contents["ffcv"]})
    assert dali.differences(ffcv) == ["its images are stored as dali, they were as ffcv"]


def test_the_layout_of_a_file_is_no_difference(folders):
    """FFCV's processes write pages in the order in which they are done."""
    beton = Beton(folders[0] / "train.beton")
    before = content_sha256(beton, beton.encoded)
    beton.storage = np.concatenate([beton.storage, beton.encoded(0)])
    beton.offsets[0] = len(beton.storage) - beton.sizes[0]
    assert content_sha256(beton, beton.encoded) == before
    beton.storage[-1] ^= 1
    assert content_sha256(beton, beton.encoded) != before


def test_a_large_data_set_is_read_when_its_files_are_not_known(here, tmp_path, monkeypatch):
    large(monkeypatch)
    said: list[str] = []
    identity = here.identity(say=said.append)
    assert not said, "its files are as they were written"
    shutil.copytree(here.root, tmp_path / "there", copy_function=shutil.copyfile)
    there = ConvertedDataset.open(tmp_path / "there")
    assert there.identity(say=said.append, progress=False) == identity
    assert len(said) == 1
    assert "are read once, to know which images these are" in said[0]
    assert there.identity(identity, there.stamps(), say=said.append) == identity
    assert len(said) == 1, "these files are known"


@pytest.mark.parametrize("size", ["small", "large"])
def test_pixels_that_were_changed_are_refused(here, monkeypatch, size):
    if size == "large":
        large(monkeypatch)
    zero_pixels(here.beton("train"), keep_time=size == "small")
    with pytest.raises(DamageError, match=r"the images or labels of train \(format ffcv\) are not those that were"):
        here.identity(progress=False)


def test_a_data_set_of_an_earlier_version_is_read_and_known_by_its_files(here, monkeypatch):
    new = here.identity()
    for file in here.manifest["files"].values():
        del file["mtime_ns"]
    del here.manifest["contents"]
    large(monkeypatch)
    said: list[str] = []
    identity = here.identity(say=said.append, progress=False)
    assert identity == new
    assert len(said) == 1
    assert here.identity(identity, here.stamps(), say=said.append) == identity
    assert len(said) == 1


def test_what_differs_is_named(tmp_path):
    def identity(folder, **how):
        return unconverted(make_source(tmp_path / folder, **how)).identity()

    before = identity("before")
    assert identity("copy").differences(before) == []
    assert identity("renamed", names=("ant", "dog", "cat")).differences(before) == ["class 1 is 'dog', it was 'bee'"]
    assert identity("more", names=(*NAMES, "dog")).differences(before) == [
        "there are 4 classes, there were 3",
        "class 'dog' is new",
    ]
    assert identity("larger", train=13).differences(before) == ["train has 5 images of class 'ant', it had 4"]


def test_a_changed_file_of_a_source_is_noticed(source):
    before = unconverted(source).identity()
    path = source.splits["test"].root / "test" / "2.png"
    image = np.array(Image.open(path))
    image[0, 0, 0] ^= 1
    Image.fromarray(image).save(path)
    assert unconverted(source).identity().differences(before) == [
        "test has as many images of each class, but they are other images or in another order"
    ]


def test_another_order_is_another_data_set(source):
    split = source.splits["train"]
    turned = replace(split, paths=[*split.paths[3:], *split.paths[:3]])
    other = replace(source, splits={**source.splits, "train": turned})
    assert unconverted(other).identity().differences(unconverted(source).identity()) == [
        "train has as many images of each class, but they are other images or in another order"
    ]


def test_a_long_list_of_differences_is_cut(source):
    identity = unconverted(source).identity()
    many = replace(identity, class_names=tuple(f"class {i}" for i in range(40)))
    assert len(many.differences(identity)) == 6
    assert many.differences(identity)[-1] == "and 39 more differences"
