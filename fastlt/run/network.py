"""The network of a recipe: as it begins, and in the form in which a stage trains it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastlt.models import Classifier, build_model, checkpoints
from fastlt.recipe import Recipe
from fastlt.steps import STEPS


def network_of(recipe: Recipe, num_classes: int, *, weights: bool) -> Classifier:
    """The network that a run of the recipe begins with, on the CPU.

    weights: whether with those that the recipe starts from; else they are drawn at random.
    ValueError as `build_model`.
    """
    asked = {key: value for key, value in vars(recipe.model).items() if key != "head_init"}
    if not weights:
        asked |= {"pretrained": False, "checkpoint": None}
    return build_model(**asked, num_classes=num_classes, image_size=recipe.data.image_size)


def network_of_stage(
    recipe: Recipe, num_classes: int, stage: str, device: torch.device, *, weights: bool = False
) -> Classifier:
    """The network in the form in which a stage trains it, without the weights: they are drawn at random.

    weights: with those that the recipe starts from, for a state that leaves the frozen ones out. ValueError where they
        cannot be had. The generators of random numbers stay where they are.
    """
    with torch.random.fork_rng(devices=[]), _without_warnings(checkpoints.log):
        model = network_of(recipe, num_classes, weights=weights)
    model.to(device).to(memory_format=recipe.memory_format)
    for one in recipe.lineage(recipe.stages[stage]):
        STEPS[one.method].prepare_model(model, one.options, seed=recipe.seed)
    return model


@contextmanager
def _without_warnings(log: logging.Logger) -> Iterator[None]:
    """Inside, nothing is said of a file whose head is left out: the run has a head of its own."""
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
