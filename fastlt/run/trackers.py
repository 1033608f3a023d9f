"""Experiment trackers: what Accelerate starts for a run, and what they are told."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

from fastlt.names import pick
from fastlt.recipe import Recipe
from fastlt.recipe.schema import values as recipe_values
from fastlt.run.atomic_file import read_json, write_json
from fastlt.run.context import RunContext
from fastlt.run.folder import tracker_id_file

PROJECT = "fastlt"
# The packages of which the pip name is not that of the tracker.
PACKAGES = {"comet_ml": "comet-ml"}
TENSORBOARD, WANDB = "tensorboard", "wandb"


def check_trackers(recipe: Recipe) -> None:
    """ValueError for trackers that Accelerate does not know, or whose package is absent; it would ignore those."""
    for name in recipe.trackers:
        pick("tracker", name, LOGGER_TYPE_TO_CLASS)
    there = {str(one.value) for one in get_available_trackers()}
    absent = [name for name in dict.fromkeys(recipe.trackers) if name not in there]
    if absent:
        packages = " ".join(PACKAGES.get(name, name) for name in absent)
        raise ValueError(
            f"trackers: {' and '.join(absent)} cannot be used, the package is not installed: pip install {packages}, "
            f"or set trackers=[{', '.join(name for name in recipe.trackers if name not in absent)}]"
        )


def started_with(name: str, identity: str, folder: Path, done: int) -> dict[str, dict[str, Any]]:
    """By tracker, what it is started with besides the project: the name of the run, and how it goes on.

    identity: of the run, the same whenever it goes on. done: iterations whose values it keeps.
    """
    return {
        # Events of later iterations, which a killed process wrote, are no longer shown.
        TENSORBOARD: {"purge_step": done + 1},
        WANDB: {"name": name, "id": identity, "resume": "allow", "dir": str(folder)},
        "mlflow": {"run_name": name},
        "swanlab": {"experiment_name": name},
        "trackio": {"name": name, "resume": "allow"},
        "clearml": {"task_name": name},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": done > 0},
    }


def hyper_parameters(recipe: Recipe) -> dict[str, str | int | float | bool | None]:
    """The values of a recipe by key, `stages.end_to_end.lr`; lists as JSON."""
    flat = {".".join(path): value.value for path, value in recipe_values(recipe).items()}
    return {k: v if v is None or isinstance(v, (str, int, float)) else json.dumps(v) for k, v in flat.items()}


class Trackers:
    """The trackers of a run. Only the main process has any to tell; the others' calls do nothing.

    A run that goes on continues its curves: values of iterations after the checkpoint are forgotten by TensorBoard and
    refused by Weights & Biases. The other trackers begin another run of the same name.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.running: dict[str, Any] = {}

    def start(self, done: int) -> None:
        """Start them for a run of which so many iterations are done; tells them the recipe."""
        recipe, folder, accelerator = self.context.recipe, self.context.folder, self.context.accelerator
        if not recipe.trackers or not self.context.main:
            return
        accelerator.init_trackers(PROJECT, init_kwargs=started_with(recipe.name, _identity(folder), folder, done))
        self.running = {one.name: one for one in accelerator.trackers}
        for name, tracker in self.running.items():
            if name in NAME:
                NAME[name](tracker, recipe.name)
            configure = CONFIGURE.get(name, lambda one, values: one.store_init_configuration(values))
            configure(tracker, hyper_parameters(recipe))

    def log(self, kind: str, values: Mapping[str, Any], iteration: int) -> None:
        """Numbers, each as `kind/name`; what is no number is left out."""
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self.running.values():
            tracker.log(numbers, step=iteration)

    def log_per_class(self, values: Mapping[str, list[float]], iteration: int) -> None:
        """Values of every class by name, as `class/name`: a histogram, or its ends and middle where there are none."""
        for name, tracker in self.running.items():
            for key, of_classes in values.items():
                HISTOGRAMS.get(name, _quantiles)(tracker, f"class/{key}", of_classes, iteration)

    def finish(self) -> None:
        """Write what is left."""
        running, self.running = self.running, {}
        for tracker in running.values():
            tracker.finish()
        self.context.accelerator.trackers.clear()


def _identity(folder: Path) -> str:
    """The name by which trackers know the run in a folder, made when it begins."""
    path = tracker_id_file(folder)
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex})
    return read_json(path, "move it away, and trackers show the run as a new one from here on")["id"]


def _configure_tensorboard(tracker: Any, values: dict[str, Any]) -> None:
    """The hyper-parameters beside the curves; Accelerate would put them into a run of their own, one at every start."""
    from torch.utils.tensorboard.summary import hparams

    shown = {key: "null" if value is None else value for key, value in values.items()}
    for summary in hparams(shown, {"validation/top1": 0.0, "test/top1": 0.0}):
        tracker.writer.file_writer.add_summary(summary)


def _tensorboard_histogram(tracker: Any, key: str, values: list[float], iteration: int) -> None:
    tracker.writer.add_histogram(key, np.asarray(values), iteration)


def _wandb_histogram(tracker: Any, key: str, values: list[float], iteration: int) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    tracker.log({key: wandb.Histogram(values)}, step=iteration)


def _quantiles(tracker: Any, key: str, values: list[float], iteration: int) -> None:
    ordered = sorted(values)
    middle = ordered[len(ordered) // 2]
    tracker.log({f"{key}_min": ordered[0], f"{key}_median": middle, f"{key}_max": ordered[-1]}, step=iteration)


# What some do by other means than Accelerate's: take the run's name, the hyper-parameters, histograms.
NAME: dict[str, Callable[[Any, str], object]] = {
    "aim": lambda tracker, name: setattr(tracker.writer, "name", name),
    "comet_ml": lambda tracker, name: tracker.writer.set_name(name),
}
CONFIGURE: dict[str, Callable[[Any, dict[str, Any]], None]] = {TENSORBOARD: _configure_tensorboard}
HISTOGRAMS: dict[str, Callable[[Any, str, list[float], int], None]] = {
    TENSORBOARD: _tensorboard_histogram,
    WANDB: _wandb_histogram,
}
