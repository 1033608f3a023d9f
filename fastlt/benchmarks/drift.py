"""How far a rolling class accuracy is from the exact one while a network trains, and what that does to the weights.

    fastlt benchmark drift recipes/cifar10_lt.yaml data.root=DIR --windows 2 5 10

Trains a stage of the recipe (method: difficulty) with the accuracy measured on the whole meta set in every iteration,
and beside it, on the same network, one rolling accuracy for each window. Its weights are those that the same
Difficulty-Net gives to it. Nothing is validated or saved.

|dA|      difference between rolling and exact accuracy of a class: mean, and largest, over classes and iterations
second    the same mean over the second half of the iterations
|dw|      difference between the class weights that follow from them
w std     for comparison: the standard deviation of the exact weights over classes, mean over iterations
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastlt.arguments import positive
from fastlt.benchmarks.rounds import report
from fastlt.benchmarks.stage_loop import DifficultyLoop, parser
from fastlt.meta.class_accuracy import ClassAccuracy
from fastlt.meta.difficulty import class_weights
from fastlt.run.context import RunContext
from fastlt.run.loading import normaliser, whole_split
from fastlt.steps.difficulty import DifficultyStep

NAME = "fastlt benchmark drift"


@dataclass(frozen=True)
class Row:
    """One window; accuracies are in 0..1, weights have mean 1."""

    window: int
    mean_accuracy_error: float
    second_half_mean_accuracy_error: float
    max_accuracy_error: float
    mean_weight_error: float
    max_weight_error: float


def main(arguments: list[str], prog: str = NAME) -> int:
    """Train, compare and print; returns the exit code. A mistake in the recipe is a ValueError."""
    options = parser(__doc__, NAME, prog)
    options.add_argument(
        "--windows",
        type=positive,
        nargs="+",
        default=[2, 5, 10, 20],
        metavar="K",
        help="windows to compare (default: 2 5 10 20)",
    )
    words = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as runs:
        settings, exact, rolling = follow(words, runs)
    rows = [row(window, exact, rolling[window]) for window in words.windows]
    exact_accuracy, exact_weights = exact
    settings |= {
        "exact_accuracy_at_the_end": exact_accuracy[-1].mean().item(),
        "exact_weight_std": exact_weights.std(1).mean().item(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    table = partial(print_table, weight_std=settings["exact_weight_std"])
    report(rows, settings, as_json=words.json, table=table)
    return 0


Course = tuple[Tensor, Tensor]  # accuracies and weights (iterations, C), float32


def follow(words: argparse.Namespace, runs: str) -> tuple[dict, Course, dict[int, Course]]:
    """Train; returns the settings, the exact course, and that of every window."""
    loop = DifficultyLoop(words, runs, exactly)
    observed = _Observed(loop.step, loop.context, words.windows)
    for batch, meta_batch in loop.batches():
        observed.step(batch, meta_batch)
    return loop.settings, observed.exact.stacked(), {k: c.stacked() for k, c in observed.rolling.items()}


def exactly(stage: str) -> list[str]:
    """The words that make a stage measure the accuracy on the whole meta set in every iteration."""
    return [f"stages.{stage}.accuracy.refresh=exact"]


class _Course:
    def __init__(self) -> None:
        self.accuracies: list[Tensor] = []
        self.weights: list[Tensor] = []

    def stacked(self) -> Course:
        return torch.stack(self.accuracies).cpu(), torch.stack(self.weights).cpu()


class _Observed:
    """A step whose network is scored by rolling accuracies as well, before each iteration."""

    def __init__(self, step: DifficultyStep, context: RunContext, windows: Sequence[int]) -> None:
        self.of_fastlt = step
        assert step.parts.class_accuracy is not None, "the method measures it"
        everything = whole_split(context, "meta")
        self.trackers = {
            window: ClassAccuracy(
                everything.images,
                everything.labels,
                context.counts.num_classes,
                prepare=normaliser(context),
                refresh="rolling",
                window=window,
                autocast=step.parts.class_accuracy.autocast,
            )
            for window in windows
        }
        self.exact = _Course()
        self.rolling = {window: _Course() for window in windows}

    def step(self, batch, meta_batch) -> None:
        accuracies = {window: tracker.update(self.of_fastlt.model) for window, tracker in self.trackers.items()}
        output = self.of_fastlt(batch, meta_batch)
        self.exact.accuracies.append(output.per_class["meta_accuracy"])
        self.exact.weights.append(output.per_class["weight"])
        with torch.no_grad():
            for window, accuracy in accuracies.items():
                self.rolling[window].accuracies.append(accuracy)
                self.rolling[window].weights.append(class_weights(self.of_fastlt.net(accuracy)))


def row(window: int, exact: Course, rolling: Course) -> Row:
    """The differences of one window from the exact course."""
    accuracy, weight = ((one - other).abs() for one, other in zip(rolling, exact, strict=True))
    return Row(
        window,
        mean_accuracy_error=accuracy.mean().item(),
        second_half_mean_accuracy_error=accuracy[len(accuracy) // 2 :].mean().item(),
        max_accuracy_error=accuracy.max().item(),
        mean_weight_error=weight.mean().item(),
        max_weight_error=weight.max().item(),
    )


def print_table(rows: list[Row], weight_std: float) -> None:
    """The rows for people."""
    titles = f"{'mean |dA|':>9}  {'second':>7}  {'max |dA|':>8}  {'mean |dw|':>9}  {'max |dw|':>8}  {'w std':>6}"
    print(f"{'window':>6}  {titles}")
    for one in rows:
        spread = f"{weight_std:6.3f}"
        print(
            f"{one.window:6}  {one.mean_accuracy_error:9.4f}  {one.second_half_mean_accuracy_error:7.4f}  "
            f"{one.max_accuracy_error:8.3f}  {one.mean_weight_error:9.5f}  {one.max_weight_error:8.4f}  {spread}"
        )
