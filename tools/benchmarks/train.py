"""Images a second of a recipe's training loop, against the same step fed one batch for ever: what the data costs.

    python tools/benchmark.py train recipes/digits_lt.yaml data.loader=ffcv

Everything is the recipe's: loader, augmentation, model, loss, method and meta batches. Without an argument it is
recipes/digits_lt.yaml. Nothing is validated or saved, and the run folder is a temporary one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastlt.recipe import load_recipe
from fastlt.state import Batch
from fastlt.trainer import Trainer, endless
from tools.benchmarks.options import positive
from tools.benchmarks.rounds import interleaved, report, row

ROOT = Path(__file__).resolve().parents[2]
LOOP, ONE_BATCH = "training loop", "one batch for ever"


def main(arguments: list[str]) -> int:
    """Measure and print; returns the exit code. A mistake in the recipe is a ValueError."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default=str(ROOT / "recipes" / "digits_lt.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--stage", help="which stage of the recipe (default: the first)")
    parser.add_argument("--iterations", type=positive, default=50, help="a round (default: 50)")
    parser.add_argument("--rounds", type=positive, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    words = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as runs:
        recipe = load_recipe(words.recipe, [*words.overrides, f"runs={runs}"])
        name = words.stage or next(iter(recipe.stages))
        if name not in recipe.stages:
            raise ValueError(f"{recipe.name} has no stage {name!r}: it has {', '.join(recipe.stages)}")
        trainer = Trainer(recipe)
        stage = recipe.stages[name]
        step, train, meta = trainer._build_stage(stage)  # a loop of its own: the trainer's also logs and evaluates
        step.start_epoch(0)
        step.train_mode()
        trainer._set_lr(step, stage, 0.0)
        loop = _Loop(step, endless(train, 0), endless(meta, 0) if meta is not None else None, words.iterations)
        try:
            speeds = interleaved({LOOP: loop.fed, ONE_BATCH: loop.one_batch}, words.rounds)
        finally:
            train.close()
            if meta is not None:
                meta.close()
    settings = {
        "recipe": recipe.name,
        "stage": name,
        "loader": train.backend,
        "batch_size": stage.batch_size,
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "data_wait_share": round(statistics.median(loop.wait_shares[1:]), 4),
    }
    report([row(speeds, LOOP, bare=ONE_BATCH), row(speeds, ONE_BATCH)], as_json=words.json, settings=settings)
    return 0


class _Loop:
    """A step and its batches; each call of `fed` and `one_batch` runs `iterations` of it and returns the images."""

    def __init__(
        self, step: Callable, batches: Iterator[Batch], meta_batches: Iterator[Batch] | None, iterations: int
    ) -> None:
        self.step, self.batches, self.meta_batches, self.iterations = step, batches, meta_batches, iterations
        self.batch = next(batches)
        self.meta_batch = None if meta_batches is None else next(meta_batches)
        self.wait_shares: list[float] = []

    def fed(self) -> int:
        images, waited, started = 0, 0.0, time.perf_counter()
        for _ in range(self.iterations):
            asked = time.perf_counter()
            batch = next(self.batches)
            meta_batch = None if self.meta_batches is None else next(self.meta_batches)
            waited += time.perf_counter() - asked
            output = self.step(batch, meta_batch)
            images += len(batch)
        output.loss.item()  # waits for the device, once a round
        self.wait_shares.append(waited / (time.perf_counter() - started))
        return images

    def one_batch(self) -> int:
        for _ in range(self.iterations):
            output = self.step(self.batch, self.meta_batch)
        output.loss.item()
        return self.iterations * len(self.batch)
