"""A stage of a recipe trained for measurements: the trainer's step, loaders and learning rate, without its log."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch

from fastlt.arguments import make_parser, positive
from fastlt.recipe import load_recipe
from fastlt.recipe.locations import SHIPPED
from fastlt.run.trainer import Trainer, endless
from fastlt.state import Batch


def parser(doc: str, name: str, prog: str) -> argparse.ArgumentParser:
    """The options that every such measurement has; arguments as of `make_parser`."""
    made = make_parser(doc, name, prog)
    made.add_argument("recipe", nargs="?", default=str(SHIPPED / "digits_lt.yaml"))
    made.add_argument("overrides", nargs="*", metavar="key.sub=value")
    made.add_argument("--stage", help="which stage of the recipe (default: the first)")
    made.add_argument("--iterations", type=positive, help="default: the whole stage")
    made.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return made


class DifficultyLoop:
    """A stage of method `difficulty`: its trainer, its step, and the batches of its iterations.

    words: what `parser` made of the command line. runs: a folder for what the trainer writes. more: override words that
    the measurement needs, given the stage's name. ValueError for a stage that is not there or of another method.
    """

    def __init__(self, words: argparse.Namespace, runs: str, more: Callable[[str], list[str]]) -> None:
        overrides = [*words.overrides, f"runs={runs}"]
        recipe = load_recipe(words.recipe, overrides)
        self.name = words.stage or next(iter(recipe.stages))
        if self.name not in recipe.stages:
            raise ValueError(f"{recipe.name} has no stage {self.name!r}: it has {', '.join(recipe.stages)}")
        method = recipe.stages[self.name].method
        if method != "difficulty":
            raise ValueError(
                f"stage {self.name} of {recipe.name} has method {method!r}, but this is measured in Difficulty-Net: "
                f"set stages.{self.name}.method=difficulty"
            )
        self.trainer = Trainer(load_recipe(words.recipe, [*overrides, *more(self.name)]))
        self.stage = self.trainer.recipe.stages[self.name]
        # A loop of its own: the trainer's also logs, evaluates and saves.
        self.step, self.train, self.meta = self.trainer._build_stage(self.stage)
        self.unit = len(self.train) if self.stage.epochs is not None else 1
        whole = self.stage.length * self.unit
        self.iterations = min(words.iterations or whole, whole)

    def batches(self) -> Iterator[tuple[Batch, Batch]]:
        """The batches of each iteration, with the epoch begun and the learning rate set; closes the loaders."""
        try:
            batches, meta_batches = endless(self.train, 0), endless(self.meta, 0)
            self.step.train_mode()
            for iteration in range(self.iterations):
                if iteration % len(self.train) == 0:
                    self.step.start_epoch(iteration // len(self.train))
                self.trainer._set_lr(self.step, self.stage, iteration / self.unit)
                yield next(batches), next(meta_batches)
        finally:
            self.train.close()
            self.meta.close()

    @property
    def settings(self) -> dict:
        """What a reader of the figures wants to know."""
        return {
            "recipe": self.trainer.recipe.name,
            "stage": self.name,
            "iterations": self.iterations,
            "device": str(self.trainer.device),
            "meta_images": len(self.trainer.dataset.labels("meta")),
            "threads": torch.get_num_threads(),
        }
