"""Finished runs in the terminal: a Markdown table of means over seeds, and the class weights as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastlt.markdown_table import markdown_table
from fastlt.report.runs import open_run
from fastlt.report.seeds import Group

METRICS = ("top1", "many", "medium", "few", "macro_f1")


def table(groups: Sequence[Group]) -> str:
    """One Markdown row a group: percentages, seconds of training, and the range of the final class weights."""
    header = ["run", "seeds", "top-1", "many", "medium", "few", "macro-F1", "training s", "weights at the end"]
    rows = []
    for group in groups:
        cells = [group.name, str(len(group.runs))]
        cells += [group.spread(metric) for metric in METRICS]
        cells.append(group.spread("train_s", scale=1.0))
        weights = [w for of_run in group.values("class_weights") for w in of_run or []]
        cells.append(f"{min(weights):.2f} … {max(weights):.2f}" if weights else "-")
        rows.append(cells)
    return markdown_table(header, rows)


def weight_history(folder: Path) -> list[tuple[int, np.ndarray]]:
    """(iteration, class weights (C,)) at every validation of a run; ValueError when its method has none."""
    history = [(r.iteration, r.values["weight"]) for r in open_run(folder).history if "weight" in r.values]
    if not history:
        raise ValueError(f"{folder} has no class weights: its method learns none, or it was never evaluated")
    return history


def weight_text(folder: Path) -> str:
    """The class weights at every validation, one line each, classes in label order."""
    history = weight_history(folder)
    width = len(str(history[-1][0]))
    return "\n".join(f"{i:>{width}}  " + " ".join(f"{w:.3f}" for w in weights) for i, weights in history)
