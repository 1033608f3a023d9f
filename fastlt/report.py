"""Finished runs compared: a Markdown table of means over seeds, and how the class weights moved."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlt.recipe import Recipe, Standing, changes, load_recipe
from fastlt.run.class_history import read_class_history
from fastlt.run.folder import class_history_file, log_file, recipe_file, result_file
from fastlt.run.log import read_log
from fastlt.run.recorded import readable_result, written_inputs
from loaders.stored.identity import DatasetIdentity

log = logging.getLogger(__name__)

METRICS = ("top1", "many", "medium", "few", "macro_f1")


@dataclass(frozen=True)
class FinishedRun:
    """data: which images it was trained on; None for a run of a version that kept no record of them."""

    folder: Path
    recipe: Recipe
    result: dict[str, Any]
    data: DatasetIdentity | None


def read_run(folder: Path) -> FinishedRun:
    """A finished run; ValueError when there is none, or its files cannot be read."""
    path, result = result_file(folder), readable_result(folder)
    if result is None:
        if path.exists():
            raise ValueError(f"{path} is damaged; the command that trained the run measures it again")
        raise ValueError(f"{folder} holds no finished run: result.json is missing; give folders below runs/")
    record = written_inputs(folder)
    try:
        recipe = load_recipe(recipe_file(folder))
    except ValueError as error:
        raise ValueError(f"{recipe_file(folder)}: {error}") from None
    return FinishedRun(folder, recipe, result, None if record is None else record.inputs.data)


def group_runs(runs: list[FinishedRun]) -> list[list[FinishedRun]]:
    """Runs that differ only in name and seed together, groups in the order in which they first appear.

    A warning names two runs of one recipe that were trained on different data; they are not in one group.
    """
    groups: list[list[FinishedRun]] = []
    for run in runs:
        for group in groups:
            if _same_recipe(group[0], run):
                wrong = [] if run.data is None or group[0].data is None else run.data.differences(group[0].data)
                if not wrong:
                    group.append(run)
                    break
                log.warning("%s was trained on other data than %s: %s", run.folder, group[0].folder, "; ".join(wrong))
        else:
            groups.append([run])
    return groups


def _same_recipe(one: FinishedRun, other: FinishedRun) -> bool:
    """Whether two recipes give the same but for the seed; where both data are known, paths do not count."""
    known = one.data is not None and other.data is not None
    allowed = {"harmless", "rounding", "same_content"} if known else {"harmless", "rounding"}
    found = changes(one.recipe, other.recipe, Standing(len(one.recipe.stages)))
    return all(change.rule in allowed or change.key == "seed" for change in found)


def label(group: list[FinishedRun]) -> str:
    """The runs' common name without its seed."""
    recipe = group[0].recipe
    return recipe.name.removesuffix(f"-{recipe.seed}")


def spread(values: list[float | None], scale: float = 100.0) -> str:
    """`mean ± sample standard deviation`; the mean alone for one run; a dash where nothing was measured."""
    scaled = [scale * v for v in values if v is not None]
    if len(scaled) < len(values):
        return "-"
    mean = f"{statistics.mean(scaled):.2f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled):.2f}"


def table(groups: list[list[FinishedRun]]) -> str:
    """One Markdown row a group: percentages, seconds of training, and the range of the final class weights."""
    header = ["run", "seeds", "top-1", "many", "medium", "few", "macro-F1", "training s", "weights at the end"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for group in groups:
        results = [run.result for run in group]
        cells = [label(group), str(len(group))]
        cells += [spread([r[metric] for r in results]) for metric in METRICS]
        cells.append(spread([r["train_s"] for r in results], scale=1.0))
        weights = [w for r in results for w in (r["class_weights"] or [])]
        cells.append(f"{min(weights):.2f} … {max(weights):.2f}" if weights else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weight_history(folder: Path) -> list[tuple[int, list[float]]]:
    """(iteration, class weights) at every evaluation of a run; ValueError when its method has no class weights."""
    records, broken = read_class_history(class_history_file(folder))
    if broken:
        log.warning("%s: %s", class_history_file(folder), broken)
    recorded = [(r.iteration, r.values["weight"].tolist()) for r in records if "weight" in r.values]
    if recorded:
        return recorded
    path = log_file(folder)  # of an earlier version
    if not path.is_file():
        raise ValueError(f"{folder} holds no log.jsonl; give a folder below runs/")
    lines, broken = read_log(path)
    if broken:
        log.warning("%s: %s", path, broken)
    history = [
        (line["iteration"], line["weight"]) for line in lines if line["kind"] == "evaluation" and "weight" in line
    ]
    if not history:
        raise ValueError(f"{folder} has no class weights in its log: its method learns none, or it was never evaluated")
    return history


def weight_text(folder: Path) -> str:
    """The class weights at every evaluation, one line each, classes in label order."""
    history = weight_history(folder)
    width = len(str(history[-1][0]))
    return "\n".join(f"{i:>{width}}  " + " ".join(f"{w:.3f}" for w in weights) for i, weights in history)


def plot_weights(folder: Path, counts: list[int], out: Path) -> None:
    """One line a class over the iterations, coloured by the class's rank in training images."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history = weight_history(folder)
    iterations = [i for i, _ in history]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colours = plt.get_cmap("viridis")
    order = sorted(range(len(counts)), key=lambda c: -counts[c])
    for rank, c in enumerate(order):
        named = f"class {c}: {counts[c]} images" if len(counts) <= 12 else None
        colour = colours(rank / max(len(order) - 1, 1))
        axes.plot(iterations, [weights[c] for _, weights in history], color=colour, label=named)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="iteration", ylabel="class weight", title=f"{folder.name}: from many (dark) to few (light) images")
    if len(counts) <= 12:
        axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(out, dpi=150)
    plt.close(figure)
