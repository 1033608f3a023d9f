"""Finished runs compared: a Markdown table of means over seeds, and how the class weights moved."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from fastlt.recipe import Recipe, differences, load_recipe
from fastlt.run.checkpoint import read_json
from fastlt.run.folder import log_file, result_file

METRICS = ("top1", "many", "medium", "few", "macro_f1")


def read_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """Recipe and result of a finished run; ValueError when there is none."""
    result = result_file(folder)
    if not result.is_file():
        raise ValueError(f"{folder} holds no finished run: result.json is missing; give folders below runs/")
    return load_recipe(folder / "recipe.yaml"), read_json(result)


def group_runs(folders: list[Path]) -> list[list[tuple[Recipe, dict[str, Any]]]]:
    """Runs that differ only in name and seed together, groups in the order in which they first appear."""
    groups: list[list[tuple[Recipe, dict[str, Any]]]] = []
    for folder in folders:
        recipe, result = read_run(folder)
        for group in groups:
            if all(d.split(":")[0] in ("name", "seed") for d in differences(group[0][0], recipe)):
                group.append((recipe, result))
                break
        else:
            groups.append([(recipe, result)])
    return groups


def label(group: list[tuple[Recipe, dict[str, Any]]]) -> str:
    """The runs' common name without its seed."""
    recipe = group[0][0]
    return recipe.name.removesuffix(f"-{recipe.seed}")


def spread(values: list[float | None], scale: float = 100.0) -> str:
    """`mean ± sample standard deviation`; the mean alone for one run; a dash where nothing was measured."""
    scaled = [scale * v for v in values if v is not None]
    if len(scaled) < len(values):
        return "-"
    mean = f"{statistics.mean(scaled):.2f}"
    return mean if len(scaled) == 1 else f"{mean} ± {statistics.stdev(scaled):.2f}"


def table(groups: list[list[tuple[Recipe, dict[str, Any]]]]) -> str:
    """One Markdown row a group: percentages, seconds of training, and the range of the final class weights."""
    header = ["run", "seeds", "top-1", "many", "medium", "few", "macro-F1", "training s", "weights at the end"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for group in groups:
        results = [result for _, result in group]
        cells = [label(group), str(len(group))]
        cells += [spread([r[metric] for r in results]) for metric in METRICS]
        cells.append(spread([r["train_s"] for r in results], scale=1.0))
        weights = [w for r in results for w in (r["class_weights"] or [])]
        cells.append(f"{min(weights):.2f} … {max(weights):.2f}" if weights else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def weight_history(folder: Path) -> list[tuple[int, list[float]]]:
    """(iteration, class weights) at every evaluation of a run; ValueError when its method has no class weights."""
    log = log_file(folder)
    if not log.is_file():
        raise ValueError(f"{folder} holds no log.jsonl; give a folder below runs/")
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
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
