"""About how long a run takes beside others, so that short ones can go first."""

from __future__ import annotations

from fastlt.recipe import DataRecipe, Recipe, StageRecipe
from fastlt.run.dataset import open_converted
from fastlt.steps import STEPS

UNKNOWN_SIZE = 10_000  # training images of a data set that has not been converted yet


def cost(recipe: Recipe, stages: list[StageRecipe]) -> float:
    """Images that go through a plain step in about the time of these stages of a recipe."""
    images = None
    total = 0.0
    for stage in stages:
        if stage.iterations is not None:
            trained_on = stage.iterations * stage.batch_size
        else:
            images = images or training_images(recipe.data)
            trained_on = stage.length * images
        total += trained_on * STEPS[stage.method].time_of(stage.options)
    return total


def training_images(data: DataRecipe) -> int:
    """The size of the training set, where it has been converted."""
    try:
        return len(open_converted(data).labels("train"))
    except ValueError:
        return UNKNOWN_SIZE
