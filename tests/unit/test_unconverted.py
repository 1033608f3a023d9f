"""Training straight from a source's files: the same batches as from a conversion, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from small_betons import mixed_shapes, needs_dali, smooth_images

from fastlt.recipe import RecipeError, load_recipe
from fastlt.run.dataset import prepare_dataset
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.sources import FileSplit, Source
from loaders.stored.convert import convert
from loaders.stored.ffcv_format import FfcvOptions
from loaders.stored.unconverted import UnconvertedDataset

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
EVALUATION = {"batch_size": 4, "device": "cpu", "train": False, "crop": CropSpec("center", 24), "num_workers": 1}


@pytest.fixture
def source(tmp_path) -> Source:
    """JPEGs and, every third one, PNGs of mixed sizes: 13 train, 4 meta and 5 test images of two classes."""
    splits = {}
    for name, count in {"train": 13, "meta": 4, "test": 5}.items():
        (tmp_path / name).mkdir()
        paths = [f"{name}/{i}.{'png' if i % 3 == 2 else 'jpg'}" for i in range(count)]
        for path, image in zip(paths, smooth_images(mixed_shapes(count), seed=count), strict=True):
            Image.fromarray(image).save(tmp_path / path)
        splits[name] = FileSplit(tmp_path, paths, np.arange(count) % 2, "made for a test")
    return Source("image_folder", ("cat", "dog"), splits)


def opened(source: Source) -> UnconvertedDataset:
    return UnconvertedDataset.open(source, source.splits["train"].root, num_workers=1, progress=False)


@pytest.mark.parametrize("backend", ["resident", "torch", pytest.param("dali", marks=needs_dali)])
def test_a_source_gives_the_batches_of_its_conversion(source, tmp_path, backend):
    dataset = opened(source)
    options = FfcvOptions(num_workers=1)
    shards = convert(source, tmp_path / "out", options=options, request={}, formats=("dali",), progress=False)
    assert (dataset.num_classes, dataset.class_names) == (shards.num_classes, shards.class_names)
    assert dataset.class_counts().counts.tolist() == shards.class_counts().counts.tolist() == [7, 6]
    training = {**EVALUATION, "train": True, "crop": CropSpec("random_resized", 24), "seed": 2}
    for arguments in (EVALUATION, training):
        loaders = [make_loader(one, "train", backend=backend, **arguments) for one in (dataset, shards)]
        for a, b in zip(*(loader.epoch(1) for loader in loaders), strict=True):
            assert torch.equal(a.index, b.index)
            assert torch.equal(a.labels, b.labels)
            # Pillow decodes the source's JPEGs, with the accurate DCT; the shards' are decoded as FFCV does.
            assert (a.images.int() - b.images.int()).abs().double().mean() < 1.5
        for loader in loaders:
            loader.close()


def test_auto_reads_a_source_through_torch_when_it_does_not_fit(source, monkeypatch):
    dataset = opened(source)
    assert make_loader(dataset, "train", backend="auto", **EVALUATION).backend == "resident"
    monkeypatch.setattr("loaders.factory.free_share", lambda device, processes: 1)
    tight = make_loader(dataset, "train", backend="auto", **EVALUATION)
    assert tight.backend == "torch"
    tight.close()
    for backend in ("ffcv", "resident_jpeg"):
        with pytest.raises(ValueError, match=f"'{backend}' backend reads converted data sets: convert "):
            make_loader(dataset, "train", backend=backend, **EVALUATION)


def test_damaged_images_are_listed_and_changed_ones_are_named(source):
    root = source.splits["train"].root
    split = pickle.loads(pickle.dumps(opened(source).stored("train")))
    Image.new("RGB", (9, 9)).save(root / "train/1.jpg")
    with pytest.raises(ValueError, match=r"train/1.jpg: it was changed after the run began"):
        split.image(1)
    (root / "train/1.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"train/1.jpg: not an image"):
        split.image(1)
    with pytest.raises(ValueError, match=r"1 of 22 images cannot be converted(?s:.*)train/1.jpg: not an image"):
        opened(source)


def test_a_recipe_reads_the_source_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = prepare_dataset(
        load_recipe(RECIPE, ["data.convert=false", "data.loader=auto"]).data, Accelerator(cpu=True)
    )
    assert isinstance(dataset, UnconvertedDataset)
    assert dataset.class_counts().counts.max() == 128
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [("data.loader=ffcv", "reads converted data sets"), ("data.converted=x", "leave one of the two")],
)
def test_recipes_that_contradict_themselves_are_refused(word, message):
    with pytest.raises(RecipeError, match=f"data.convert: is false, but .*{message}"):
        load_recipe(RECIPE, ["data.convert=false", word])
