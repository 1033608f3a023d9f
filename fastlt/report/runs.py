"""What a run folder holds, finished or not, as far as it can be read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastlt import file_lock
from fastlt.recipe import Recipe, read_resolved
from fastlt.run.class_history import ClassRecord, read_class_history
from fastlt.run.divergence import recorded_divergence
from fastlt.run.folder import (
    class_history_file,
    lock_file,
    log_file,
    predictions_file,
    recipe_file,
    result_file,
)
from fastlt.run.log import read_log
from fastlt.run.predictions import Predictions, read_predictions
from fastlt.run.recorded import readable_result, written_inputs
from fastlt.state import ClassCounts
from loaders.stored.identity import DatasetIdentity

NEEDED = ("per_class_accuracy", "class_counts", "train_s", "img_s", "data_wait_share")  # of a result, by a page
SAME_TOP1 = 0.005  # by which the accuracy of one model differs at most between two devices


@dataclass(frozen=True)
class Run:
    """A run folder.

    result: the content of `result.json`; None while the run is not finished, or where the file is damaged.
    data: which images it was trained on; None for a run of a version that kept no record of them.
    """

    folder: Path
    recipe: Recipe
    result: dict[str, Any] | None
    data: DatasetIdentity | None

    @cached_property
    def counts(self) -> ClassCounts | None:
        """The training images of each class and its name; None where nothing says so."""
        shots = self.recipe.data.shots
        if self.result is not None:
            counts = np.array(self.result["class_counts"], dtype=np.int64)
            names = self.result.get("class_names") or [f"class {c}" for c in range(len(counts))]
            return ClassCounts(counts, tuple(names), shots)
        if self.data is None:
            return None
        return ClassCounts(np.array(self.data.class_counts["train"], dtype=np.int64), self.data.class_names, shots)

    @cached_property
    def _log(self) -> tuple[list[dict[str, Any]], str]:
        try:
            return read_log(log_file(self.folder))
        except ValueError as error:
            return [], str(error)

    @cached_property
    def _history(self) -> tuple[list[ClassRecord], str]:
        try:
            records, broken = read_class_history(class_history_file(self.folder))
        except ValueError as error:
            records, broken = [], str(error)
        return records or _records_of_log(self.lines("evaluation")), broken

    @cached_property
    def _predictions(self) -> tuple[dict[str, Predictions], str]:
        path = predictions_file(self.folder)
        if self.result is None or not path.exists():
            return {}, ""
        try:
            found = read_predictions(path)
        except ValueError as error:
            return {}, f"{path.name} cannot be read ({error})"
        classes = len(self.result["class_counts"])
        if any(max(of.labels.max(initial=0), of.classes.max(initial=0)) >= classes for of in found.values()):
            return {}, f"{path.name} is of more classes than {result_file(self.folder).name}"
        if not is_of(found["test"], self.result):
            return {}, f"{path.name} is not of the model that {result_file(self.folder).name} is of"
        return found, ""

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The whole lines of `log.jsonl` of a kind, "train" or "evaluation"."""
        return [line for line in self._log[0] if line["kind"] == kind]

    @property
    def history(self) -> list[ClassRecord]:
        """The values of all classes at each validation. A run of an earlier version has them in its log."""
        return self._history[0]

    @property
    def predictions(self) -> dict[str, Predictions]:
        """By split; empty where the run has none."""
        return self._predictions[0]

    @property
    def damage(self) -> list[str]:
        """What of the folder cannot be read, one sentence each."""
        broken_log = f"{log_file(self.folder).name}: {self._log[1]}" if self._log[1] else ""
        broken_history = f"{class_history_file(self.folder).name}: {self._history[1]}" if self._history[1] else ""
        return [text for text in (broken_log, broken_history, self._predictions[1]) if text]

    @property
    def status(self) -> str:
        """`finished`, or how far the run is and whether it goes on."""
        if self.result is not None:
            return "finished"
        if result_file(self.folder).exists():
            return "result.json is damaged; the command that trained the run measures it again"
        try:
            divergence = recorded_divergence(self.folder)
        except (ValueError, TypeError):
            divergence = None  # damaged; the log says where it was
        if divergence is not None:
            return f"diverged in stage {divergence.stage}, iteration {divergence.iteration}"
        logged = self._log[0]
        where = f"stage {logged[-1].get('stage')}, iteration {logged[-1]['iteration']}" if logged else "its first lines"
        if is_locked(self.folder):
            return f"in training: {where}"
        return f"unfinished: stopped at {where}" if logged else "unfinished: nothing is logged yet"


def open_run(folder: Path) -> Run:
    """A run, finished or not; ValueError where there is none, or its recipe cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give folders below runs/")
    if not recipe_file(folder).exists():
        raise ValueError(f"{folder} holds no run: {recipe_file(folder).name} is missing; give folders below runs/")
    record = written_inputs(folder)
    try:
        recipe = read_resolved(recipe_file(folder))
    except ValueError as error:
        raise ValueError(f"{recipe_file(folder)}: {error}") from None
    return Run(folder, recipe, readable_result(folder), None if record is None else record.inputs.data)


def open_finished(folder: Path) -> Run:
    """A finished run; ValueError when there is none, or its files cannot be read."""
    if not result_file(folder).exists():
        missing = f"{folder} holds no finished run: {result_file(folder).name} is missing"
        raise ValueError(f"{missing}; give folders below runs/")
    run = open_run(folder)
    if run.result is None:
        raise ValueError(f"{result_file(folder)} is damaged; the command that trained the run measures it again")
    return run


def open_for_page(folder: Path) -> Run:
    """A run, finished or not, whose result, if there is one, holds what a page is made from; ValueError otherwise."""
    run = open_run(folder)
    if run.result is not None:
        absent = [key for key in NEEDED if key not in run.result]
        if absent:
            raise ValueError(f"{result_file(folder)} is not of a training: it has no {', '.join(absent)}")
        if len(run.result["per_class_accuracy"]) != len(run.result["class_counts"]):
            raise ValueError(f"{result_file(folder)} is damaged: its accuracies and counts are not of as many classes")
    return run


def is_of(test: Predictions, result: dict[str, Any]) -> bool:
    """Whether a result is that of these predictions. Another device may decide the odd image otherwise."""
    return bool(abs(test.right.mean() - result["top1"]) <= SAME_TOP1)


def is_locked(folder: Path) -> bool:
    """Whether a process trains in a run folder now."""
    path = lock_file(folder)
    try:
        with path.open("rb") as file:
            return not file_lock.take(file.fileno(), path)
    except OSError:  # it is not there, or may not be read
        return False


def _records_of_log(lines: list[dict[str, Any]]) -> list[ClassRecord]:
    """The values of classes that an earlier version wrote into its log."""
    records = []
    for line in lines:
        lists = {key.removeprefix("per_class_"): value for key, value in line.items() if isinstance(value, list)}
        values = {name: np.asarray(value, dtype=np.float32) for name, value in lists.items()}
        if values:
            records.append(ClassRecord(line["iteration"], line.get("stage", ""), values))
    return records
