"""Runs that differ in nothing but their seed, and the mean and spread of what they measured."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fastlt.recipe import Standing, changes
from fastlt.report.runs import Run
from fastlt.state import ClassCounts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """Runs of one recipe on the same data under several seeds."""

    runs: list[Run]

    @property
    def name(self) -> str:
        """The runs' common name without its seed."""
        recipe = self.runs[0].recipe
        return recipe.name.removesuffix(f"-{recipe.seed}")

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.result is not None]

    @property
    def results(self) -> list[dict[str, Any]]:
        """Of the finished runs."""
        return [run.result for run in self.runs if run.result is not None]

    @property
    def predicted(self) -> list[Run]:
        """The finished runs that kept their predictions."""
        return [run for run in self.finished if run.predictions]

    @cached_property
    def counts(self) -> ClassCounts | None:
        """Training images and names of the classes; None where no run says so."""
        return next((run.counts for run in self.runs if run.counts is not None), None)

    def values(self, key: str) -> list[Any]:
        """What each result says under `key`, None where it does not."""
        return [result.get(key) for result in self.results]

    def spread(self, key: str, scale: float = 100.0) -> str:
        """`mean ± sample standard deviation` of a metric over the finished runs."""
        return spread(self.values(key), scale)

    @cached_property
    def class_accuracy(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and spread over seeds of the test accuracy of each class: float64 (C,) in [0, 1]; None when unfinished.

        NaN for a class without test images; the spread is NaN with one seed.
        """
        if not self.results:
            return None
        accuracy = np.array([result["per_class_accuracy"] for result in self.results], dtype=float)
        return accuracy.mean(axis=0), deviation(accuracy)

    def last_value(self, name: str) -> np.ndarray | None:
        """The mean over seeds of a class value at the last validation, float64 (C,); None where no run has it."""
        last = [next((r.values[name] for r in reversed(run.history) if name in r.values), None) for run in self.runs]
        found = [values for values in last if values is not None]
        return np.mean(found, axis=0, dtype=float) if found else None


def deviation(values: np.ndarray) -> np.ndarray:
    """The sample standard deviation along the first axis; NaN where there is one value."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)


def spread(values: Sequence[float | None], scale: float = 100.0) -> str:
    """`mean ± sample standard deviation`; the mean alone for one run; a dash where nothing was measured."""
    scaled = [scale * v for v in values if v is not None]
    if len(scaled) < len(values) or not scaled:
        return "-"
    mean = f"{statistics.mean(scaled):.2f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled):.2f}"


def group_runs(runs: list[Run], say: Callable[[str], object] = log.warning) -> list[Group]:
    """Runs that differ only in name and seed together, groups in the order in which they first appear.

    `say` is told of two runs of one recipe that were trained on different data; they are not in one group.
    """
    groups: list[Group] = []
    for run in runs:
        for group in groups:
            first = group.runs[0]
            if _same_recipe(first, run):
                wrong = [] if run.data is None or first.data is None else run.data.differences(first.data)
                if not wrong:
                    group.runs.append(run)
                    break
                say(f"{run.folder} was trained on other data than {first.folder}: {'; '.join(wrong)}")
        else:
            groups.append(Group([run]))
    return groups


def _same_recipe(one: Run, other: Run) -> bool:
    """Whether two recipes give the same but for the seed; where both data are known, paths do not count."""
    known = one.data is not None and other.data is not None
    allowed = {"harmless", "rounding", "same_content"} if known else {"harmless", "rounding"}
    found = changes(one.recipe, other.recipe, Standing(len(one.recipe.stages)))
    return all(change.rule in allowed or change.key == "seed" for change in found)
