"""The mean over shifted crops: which views they are, and that the test takes it and validation does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import five_crop

from fastlt.ensemble import Member
from fastlt.recipe import RecipeError, load_recipe
from fastlt.run.loading import open_evaluation_loader
from fastlt.run.preflight import prepare
from fastlt.run.shifted_crops import mean_logits
from fastlt.run.trained import read_finished
from fastlt.run.trainer import Trainer

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "digits_lt.yaml"
FIVE = ["data.eval_crop=center", "data.eval_ratio=1", "data.test_crops=5", "data.test_expand=3"]


def test_the_mean_is_of_logits_in_float32():
    images = torch.rand(2, 3, 10, 10)
    found = mean_logits(lambda x: x.flatten(1)[:, :4].bfloat16(), images, 8)
    expected = torch.stack([x.flatten(1)[:, :4].bfloat16().double() for x in five_crop(images, [8, 8])]).mean(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(mean_logits(lambda x: x.bfloat16(), images, 10), images.bfloat16())


def test_the_test_takes_five_crops_and_validation_one(digits_words):
    words = [*digits_words, *FIVE]
    trainer = Trainer(prepare(load_recipe(RECIPE, words)))
    sides = {
        split: next(iter(open_evaluation_loader(trainer.context, split).epoch(0))).images.shape[-1]
        for split in ("train", "meta", "test")
    }
    assert sides == {"train": 8, "meta": 8, "test": 11}
    result = trainer.fit()
    model, right, total = trainer.model.eval(), 0, 0
    for batch in open_evaluation_loader(trainer.context, "test").epoch(0):
        views = [trainer.evaluation.normalise(crop) for crop in five_crop(batch.images, [8, 8])]
        with torch.no_grad():
            logits = torch.stack([model(view) for view in views]).mean(0)
        right, total = right + (logits.argmax(1) == batch.labels).sum().item(), total + len(batch)
    assert result["top1"] == pytest.approx(right / total, abs=1e-9)
    member = Member(read_finished(trainer.folder), trainer.context.dataset)
    labels = torch.from_numpy(trainer.context.dataset.labels("test"))
    found = (member.logits("test", torch.device("cpu")).argmax(1) == labels).double().mean().item()
    assert found == pytest.approx(right / total, abs=1e-9)


def test_several_crops_of_images_that_are_left_as_they_are_are_refused():
    with pytest.raises(RecipeError, match=r"data.test_crops: is 5 .*set data.eval_crop: center"):
        load_recipe(RECIPE, ["data.test_crops=5"])
