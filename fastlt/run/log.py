"""The output of a run: a JSONL file, a progress bar, and the table at the end."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastlt import strict_json
from fastlt.run.appended_file import AppendedFile
from fastlt.run.atomic_file import RunFileError
from fastlt.run.folder import damaged_log_file
from fastlt.state import ClassCounts

log = logging.getLogger(__name__)

IN_NOTEBOOK = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
SHOWN = 5  # broken lines that a message names
MOST_CLASSES = 40  # that the table of a result lists one by one


class RunLog(AppendedFile):
    """Appends one JSON object a line to `log.jsonl`; on resuming, forgets what was logged after the checkpoint."""

    def open(self, upto_iteration: int) -> None:
        """Start writing, keeping the lines up to and including `upto_iteration` (counted over all stages)."""
        if not self.enabled:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines, broken = read_log(self.path)
        if broken:
            kept_as = shutil.copy2(self.path, damaged_log_file(self.path.parent))
            log.warning("%s: %s; the other lines are kept, and the file as it was is %s", self.path, broken, kept_as)
        kept = [line for line in lines if line["iteration"] <= upto_iteration]
        self.begin("".join(strict_json.dumps(line) + "\n" for line in kept).encode())

    def write(self, kind: str, iteration: int, **values: Any) -> None:
        """One line: `kind` is "train" or "evaluation"; values are JSON-ready, null where not finite. RunFileError."""
        if self.file is not None:
            self.append((strict_json.dumps({"kind": kind, "iteration": iteration, **values}) + "\n").encode())


def read_log(path: Path) -> tuple[list[dict[str, Any]], str]:
    """The lines of a `log.jsonl`, and which of them are broken, in words; "" when none is, or the file is absent.

    A kill in the middle of a write leaves the last line without an end: it is no damage.
    """
    lines, broken = [], []
    try:
        *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    except OSError as error:
        raise RunFileError(f"{path} cannot be read: {error.strerror}") from None
    for number, text in enumerate(whole, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("iteration"), int) and isinstance(line.get("kind"), str):
            lines.append(line)
        else:
            broken.append(str(number))
    more = ", …" if len(broken) > SHOWN else ""
    return lines, f"line {', '.join(broken[:SHOWN])}{more} cannot be read" if broken else ""


def weight_means(weights: Tensor, counts: ClassCounts) -> dict[str, float]:
    """The mean of class weights (C,) over the classes of each group that has any, as "weight_<group>"."""
    return {
        f"weight_{group}": weights[torch.from_numpy(mask).to(weights.device)].mean().item()
        for group, mask in counts.shot_masks().items()
        if mask.any()
    }


class StageBar(tqdm):
    """The progress line of a stage; in a notebook, a widget. left: asked for the time that the run will take still.

    Redrawn twice a second; in a log file, where nothing can be redrawn, once a minute.
    """

    def __init__(self, total: int, done: int, title: str, left: Callable[[], str], *, enabled: bool) -> None:
        self.left = left
        drawn = IN_NOTEBOOK or sys.stderr.isatty()
        super().__init__(
            total=total,
            initial=done,
            desc=title,
            disable=not enabled,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {left}{postfix}]",
            mininterval=0.5 if drawn else 60.0,
            maxinterval=10.0 if drawn else 60.0,
            dynamic_ncols=True,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "left": self.left()}


def percent(value: float | None) -> str:
    """A fraction as a percentage with two decimals; a dash where there is nothing to say."""
    return "-" if value is None else f"{100 * value:.2f}"


def selection_lines(result: dict[str, Any]) -> list[str]:
    """One line for each model that was tested, with its validation accuracy and that one's standard error."""
    lines = []
    for select, model in (result.get("selection") or {}).items():
        mark = "*" if select == result["select"] else " "
        validation = f"{percent(model['validation_top1'])} ± {percent(model['validation_top1_se'])} %"
        test = f"test {percent(model['top1'])} %"
        lines.append(f"{mark} {select:9}iteration {model['iteration']}: validation {validation}, {test}")
    return lines


def result_table(result: dict[str, Any], counts: ClassCounts) -> str:
    """The end of a run for a person: overall, by shots, and every class with its count and learned weight.

    With more than MOST_CLASSES classes only the largest and the smallest ones are listed. Where classes have no image
    in the test split, a column says over how many the means are.
    """
    lines = group_lines(result, counts)
    lines[-1] += f"   {result['img_s']:.0f} img/s   {result['train_s']:.0f} s of training"
    return "\n".join([*lines, *selection_lines(result), *class_lines(result, counts)])


def group_lines(metrics: dict[str, Any], counts: ClassCounts) -> list[str]:
    """Accuracy overall and by shots, then what else is measured of all images."""
    tested = metrics.get("classes_evaluated") or {"all": counts.num_classes}  # earlier runs did not count them
    partly = tested["all"] < counts.num_classes
    heading = f"{'tested':>9}" if partly else ""
    lines = [f"{'':16}{'classes':>9}{heading}{'images':>9}{'top-1 %':>10}"]
    every = np.ones(counts.num_classes, dtype=bool)
    rows = [("overall", "top1", "all", every), ("class mean", "balanced_accuracy", "all", every)]
    rows += [(f"{group}-shot", group, group, mask) for group, mask in counts.shot_masks().items()]
    for name, metric, group, mask in rows:
        if metric == "balanced_accuracy" and percent(metrics.get(metric)) in ("-", percent(metrics["top1"])):
            continue  # of a balanced test split it is the row above
        of_test = f"{tested[group]:>9}" if partly else ""
        images = int(counts.counts[mask].sum())
        lines.append(f"{name:16}{int(mask.sum()):>9}{of_test}{images:>9}{percent(metrics[metric]):>10}")
    lines.append(
        f"\ntop-5 {percent(metrics['top5'])} %   macro-F1 {percent(metrics['macro_f1'])} %   "
        f"ECE {percent(metrics['ece'])} %"
    )
    return lines


def class_lines(metrics: dict[str, Any], counts: ClassCounts, all_in: str = "result.json") -> list[str]:
    """Every class with its training images and accuracy, and of a result with its weight; see `result_table`."""
    weights, of_result = metrics.get("class_weights"), "class_weights" in metrics
    heading = f"{'weight':>9}" if of_result else ""
    lines = [f"\n{'class':24}{'images':>8}{heading}{'top-1 %':>10}"]
    order = sorted(range(counts.num_classes), key=lambda c: -counts.counts[c])
    shown = order if len(order) <= MOST_CLASSES else order[: MOST_CLASSES // 2] + order[-MOST_CLASSES // 2 :]
    for position, c in enumerate(shown):
        if len(shown) < len(order) and position == MOST_CLASSES // 2:
            lines.append(f"... {len(order) - len(shown)} more classes in {all_in} ...")
        weight = f"{'-' if weights is None else f'{weights[c]:.3f}':>9}" if of_result else ""
        accuracy = percent(metrics["per_class_accuracy"][c])
        lines.append(f"{counts.names[c][:23]:24}{int(counts.counts[c]):>8}{weight}{accuracy:>10}")
    return lines
