"""The files of a run folder."""

from __future__ import annotations

import os
from pathlib import Path

SELECTIONS = ("last", "best", "smoothed")  # the models of a stage


def recipe_file(folder: Path) -> Path:
    """The recipe with every default filled in, written before the first iteration."""
    return folder / "recipe.yaml"


def inputs_file(folder: Path) -> Path:
    """Which data a run reads, written with the recipe."""
    return folder / "inputs.json"


def tracker_id_file(folder: Path) -> Path:
    """By what name experiment trackers know the run; only there when it has any."""
    return folder / "trackers.json"


def log_file(folder: Path) -> Path:
    """One JSON object a line."""
    return folder / "log.jsonl"


def damaged_log_file(folder: Path) -> Path:
    """A log as it was found, with lines that cannot be read."""
    return folder / "log-damaged.jsonl"


def class_history_file(folder: Path) -> Path:
    """Accuracy, weight and difficulty of every class at each validation."""
    return folder / "class_history.npy"


def predictions_file(folder: Path) -> Path:
    """What the tested model predicts for the test and the validation images, written at the end, before the result."""
    return folder / "predictions.npz"


def result_file(folder: Path) -> Path:
    """Written once, at the end."""
    return folder / "result.json"


def earlier_result_file(folder: Path, which: str) -> Path:
    """The result of a run that went on after it was finished; which: its number of iterations, "damaged", or for a
    model whose result is gone "unknown".
    """
    return folder / f"result-{which}.json"


def model_folder(folder: Path) -> Path:
    """The trained model in a form that timm reads, with its card; written once, after the result."""
    return folder / "model"


def earlier_model_folder(folder: Path, which: str) -> Path:
    """The model of a run that went on after it was finished, as `earlier_result_file`."""
    return folder / f"model-{which}"


def divergence_file(folder: Path) -> Path:
    """What became infinite or NaN after the last checkpoint; the next checkpoint removes it."""
    return folder / "diverged.json"


def last_checkpoint(folder: Path) -> Path:
    """All that a run needs to go on from."""
    return folder / "checkpoints" / "last.pt"


def stage_checkpoint(folder: Path, select: str, stage: str) -> Path:
    """A model of a stage; select: one of SELECTIONS, as `StageRecipe.select`."""
    # last.pt is what a run goes on from.
    return folder / "checkpoints" / f"{'final' if select == 'last' else select}_{stage}.pt"


def version_file(path: Path, number: int) -> Path:
    """Where a checkpoint is that was saved as `path` and replaced so many times since; `path` itself for 0."""
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def versions(path: Path) -> dict[int, Path]:
    """The files that were saved as `path` and kept, newest first, by the number of `version_file`."""
    if not path.parent.is_dir():
        return {}
    numbers = {p.name.removeprefix(f"{path.name}."): p for p in path.parent.iterdir()}
    older = {int(number): p for number, p in numbers.items() if number.isdecimal()}
    return {**({0: path} if path.exists() else {}), **dict(sorted(older.items()))}


def lock_file(folder: Path) -> Path:
    """Locked by the process that trains here, which stands in it; removed when that process ends."""
    return folder / ".lock"


def part_file(path: Path) -> Path:
    """The name under which this process writes a file before it takes its place."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def unfinished_files(folder: Path) -> list[Path]:
    """Files and folders of `part_file` that a killed process left."""
    return [*folder.glob("*.part"), *(folder / "checkpoints").glob("*.part")]


def is_finished(folder: Path) -> bool:
    """Whether a run has been trained and measured here."""
    return recipe_file(folder).exists() and result_file(folder).exists()
