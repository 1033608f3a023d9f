"""The files of a run folder."""

from __future__ import annotations

from pathlib import Path


def recipe_file(folder: Path) -> Path:
    """The recipe with every default filled in, written before the first iteration."""
    return folder / "recipe.yaml"


def log_file(folder: Path) -> Path:
    """One JSON object a line."""
    return folder / "log.jsonl"


def result_file(folder: Path) -> Path:
    """Written once, at the end."""
    return folder / "result.json"


def last_checkpoint(folder: Path) -> Path:
    """All that a run needs to go on from."""
    return folder / "checkpoints" / "last.pt"


def best_checkpoint(folder: Path, stage: str) -> Path:
    """The model of a stage with the highest validation top-1."""
    return folder / "checkpoints" / f"best_{stage}.pt"


def is_finished(folder: Path) -> bool:
    """Whether a run has been trained and measured here."""
    return recipe_file(folder).exists() and result_file(folder).exists()
