"""DALI's own augmentation: what it does to a batch, that it resumes exactly, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_betons import mixed_shapes, needs_dali, write_small

from fastlt.recipe import RecipeError, load_recipe
from loaders.factory import make_loader
from loaders.order.crop import CropSpec
from loaders.readers.dali_augment import build_dali_augment

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
CROP = CropSpec("random_resized", 24)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("jpegs") / "train.beton", mixed_shapes(37), "jpg")


def loader(dataset, spec, **changes):
    arguments = {"batch_size": 8, "device": "cpu", "train": True, "crop": CROP, "num_workers": 1, "backend": "dali"}
    return make_loader(dataset, "train", dali_augment=spec, **{**arguments, **changes})


@needs_dali
@pytest.mark.parametrize("spec", [{"auto_augment": {"policy": "cifar10"}}, {"rand_augment": {"num_ops": 1}}], ids=str)
def test_images_change_and_their_order_does_not(jpegs, spec):
    plain, augmented = (list(loader(jpegs, s, seed=4).epoch(2)) for s in (None, spec))
    changed = [(a.images != b.images).flatten(1).any(1) for a, b in zip(augmented, plain, strict=True)]
    assert 0.3 < torch.cat(changed).double().mean() <= 1
    assert all(torch.equal(a.index, b.index) for a, b in zip(augmented, plain, strict=True))


@needs_dali
def test_a_resumed_epoch_goes_on_exactly(jpegs):
    augmented = loader(jpegs, "trivial_augment", seed=4)
    whole = list(augmented.epoch(2))
    next(augmented.epoch(5))  # another epoch, given up
    for first in (0, 3):
        rest = list(augmented.epoch(2, first))
        assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[first:], strict=True))
    assert list(augmented.epoch(2, len(whole))) == []
    assert not any(torch.equal(a.images, b.images) for a, b in zip(augmented.epoch(3), whole, strict=True))
    augmented.close()


@needs_dali
def test_evaluation_is_never_augmented_and_ranks_draw_apart(jpegs):
    spec = {"rand_augment": {"num_ops": 2, "magnitude": 20}}
    center = CropSpec("center", 24)
    plain, asked = (loader(jpegs, s, train=False, crop=center) for s in (None, spec))
    assert all(torch.equal(a.images, b.images) for a, b in zip(plain.epoch(0), asked.epoch(0), strict=True))
    same = [next(loader(jpegs, spec, rank=rank, world_size=2).epoch(0)).images for rank in (0, 1)]
    assert not torch.equal(*same)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("auto_augmnt", "did you mean 'auto_augment'"),
        ("auto_augment", "dali_augment.auto_augment needs policy"),
        ({"auto_augment": {"policy": "cifar"}}, "did you mean 'cifar10'"),
        (
            {"auto_augment": {"policy": ["cifar10"]}},
            "dali_augment.auto_augment.policy is ['cifar10']: ",
        ),
        ({"rand_augment": {"magnitude": 31}}, "dali_augment.rand_augment.magnitude is 31"),
        ({"rand_augment": {"num_op": 2}}, "did you mean 'num_ops'"),
        ({"trivial_augment": {"bins": 2}}, "takes no options"),
        (["rand_augment"], "it must be one name"),
        ({"rand_augment": 3}, "option of dali_augment.rand_augment"),
    ],
)
def test_mistakes_are_named_with_advice(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_dali_augment(spec)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.dali_augment=rand_augment"], "data.dali_augment: is set, but data.loader is"),
        (["data.dali_augment=rand_augmnt", "data.loader=dali"], "did you mean 'rand_augment'"),
        (
            ["data.dali_augment=rand_augment", "data.loader=dali", "data.augment=[{auto_augment: {policy: svhn}}]"],
            "data.augment has auto_augment; leave one of the two out",
        ),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(words, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(RECIPE, words)


def test_other_backends_refuse_it(jpegs):
    with pytest.raises(ValueError, match="dali_augment is for the backends dali and resident_jpeg, not for 'ffcv'"):
        loader(jpegs, "rand_augment", backend="ffcv")


def test_a_recipe_takes_it_with_options():
    words = ["data.loader=resident_jpeg", "data.dali_augment={auto_augment: {policy: cifar10}}"]
    data = load_recipe(RECIPE, words).data
    assert data == replace(data, dali_augment={"auto_augment": {"policy": "cifar10"}})
