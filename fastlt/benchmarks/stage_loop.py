"""A stage of a recipe trained for measurements: the trainer's step, loaders and learning rate, without its log."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch

from fastlt.arguments import make_parser, positive
from fastlt.recipe import Recipe, load_recipe
from fastlt.recipe.locations import SHIPPED
from fastlt.run.loading import endless
from fastlt.run.preflight import prepare
from fastlt.run.trainer import Trainer
from fastlt.state import Batch
from fastlt.steps.difficulty import DifficultyStep


def parser(doc: str | None, name: str, prog: str, a_round: int | None = None) -> argparse.ArgumentParser:
    """The options that every such measurement has; arguments as of `make_parser`.

    a_round: how many iterations a round has, in a measurement in rounds.
    """
    made = make_parser(doc, name, prog)
    made.add_argument("recipe", nargs="?", default=str(SHIPPED / "digits_lt.yaml"))
    made.add_argument("overrides", nargs="*", metavar="key.sub=value")
    made.add_argument("--stage", help="which stage of the recipe (default: the first)")
    whole = "default: the whole stage" if a_round is None else f"a round (default: {a_round})"
    made.add_argument("--iterations", type=positive, default=a_round, help=whole)
    made.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return made


def stage_of(recipe: Recipe, words: argparse.Namespace) -> str:
    """The stage that the command line names, or the first; ValueError for one that the recipe does not have."""
    name = words.stage or next(iter(recipe.stages))
    if name not in recipe.stages:
        raise ValueError(f"{recipe.name} has no stage {name!r}: it has {', '.join(recipe.stages)}")
    return name


class DifficultyLoop:
    """A stage of method `difficulty`: its context, its step, and the batches of its iterations.

    words: what `parser` made of the command line. runs: a folder for what the trainer writes. more: override words that
    the measurement needs, given the stage's name. ValueError for a stage that is not there or of another method.
    """

    def __init__(self, words: argparse.Namespace, runs: str, more: Callable[[str], list[str]]) -> None:
        overrides = [*words.overrides, f"runs={runs}"]
        recipe = load_recipe(words.recipe, overrides)
        self.name = stage_of(recipe, words)
        method = recipe.stages[self.name].method
        if method != "difficulty":
            raise ValueError(
                f"stage {self.name} of {recipe.name} has method {method!r}, but this is measured in Difficulty-Net: "
                f"set stages.{self.name}.method=difficulty"
            )
        self.context = prepare(load_recipe(words.recipe, [*overrides, *more(self.name)]))
        # A loop of its own: the trainer's also logs, evaluates and saves.
        self.stage = Trainer(self.context).build_stage(self.name)
        assert isinstance(self.stage.step, DifficultyStep)
        self.step = self.stage.step
        self.iterations = min(words.iterations or self.stage.iterations, self.stage.iterations)

    def batches(self) -> Iterator[tuple[Batch, Batch]]:
        """The batches of each iteration, with the epoch begun and the learning rate set; closes the loaders."""
        loaders = self.stage.loaders
        assert loaders.meta is not None, "the method takes meta batches"
        try:
            batches, meta_batches = endless(loaders.train, 0), endless(loaders.meta, 0)
            self.step.train_mode()
            for iteration in range(self.iterations):
                self.stage.begin(iteration)
                yield next(batches), next(meta_batches)
        finally:
            loaders.close()

    @property
    def settings(self) -> dict:
        """What a reader of the figures wants to know."""
        return {
            "recipe": self.context.recipe.name,
            "stage": self.name,
            "iterations": self.iterations,
            "device": str(self.context.device),
            "meta_images": len(self.context.dataset.labels("meta")),
            "threads": torch.get_num_threads(),
        }
