"""The figures of a report, one function each: what is drawn, in the colours and sizes of `style`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fastlt.report.blocks import slug
from fastlt.report.calibration import Calibration
from fastlt.report.confusion import MOST_CLASSES, Confusion, by_count
from fastlt.report.runs import Run
from fastlt.report.seeds import Group
from fastlt.report.style import (
    GRID,
    HEAT,
    INK,
    MUTED,
    ON_COLOUR,
    SHOTS,
    SURFACE,
    TEXT,
    WIDTH,
    colour_of,
    dashes_of,
    new_figure,
    shortened,
    spaced,
)
from fastlt.run.metrics import ECE_BINS
from fastlt.state import ClassCounts

MOST_POINTS = 1000  # that are drawn as shapes; more are one picture
NAMED_CELLS = 12  # rows of a matrix up to which every cell has its number
COUNT_BINS = 12
NAMED_ENDS = 3  # highest and lowest classes that have their names beside their curves
SHORT_LABEL = 24  # characters of a label that has another beside it in the legend


@dataclass(frozen=True)
class Series:
    """A group of runs among those that are compared: its place gives its colour, and no other has its name.

    file: the name as a part of the names of files.
    """

    group: Group
    number: int
    name: str
    file: str

    @property
    def colour(self) -> str:
        return colour_of(self.number)

    @property
    def dashes(self) -> str:
        return dashes_of(self.number)

    @property
    def label(self) -> str:
        return shortened(self.name, 40)


def make_series(groups: Sequence[Group]) -> list[Series]:
    """One for each group. Groups of one name are told apart by a folder of each."""
    names = [group.name for group in groups]
    names = [
        name if names.count(name) == 1 else f"{name} ({group.runs[0].folder})"
        for name, group in zip(names, groups, strict=True)
    ]
    files = [slug(name) for name in names]
    files = [file if files.count(file) == 1 else f"{file}_{number}" for number, file in enumerate(files, start=1)]
    return [Series(group, number, names[number], files[number]) for number, group in enumerate(groups)]


def percent_axis(axes: Axes, which: str = "y") -> None:
    """Fractions are written as percentages."""
    axis = axes.yaxis if which == "y" else axes.xaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))


def legend_below(axes: Axes, columns: int | None = None) -> None:
    """The legend under the plot, where it covers nothing; none for a single entry.

    columns: by default two where the labels are short enough for them.
    """
    _, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        ncols = columns or (2 if max(map(len, labels)) <= SHORT_LABEL else 1)
        axes.figure.legend(loc="outside lower left", ncols=ncols, handlelength=1.6)


def accuracy_by_count(series: Sequence[Series]) -> Figure:
    """Test accuracy of each class against its training images, with the mean over classes of like size."""
    figure, axes = new_figure("Accuracy per class by training images")
    for one in series:
        counts, accuracy = one.group.counts, one.group.class_accuracy
        assert counts is not None
        assert accuracy is not None
        known = ~np.isnan(accuracy[0])
        images, mean = counts.counts[known], accuracy[0][known]
        many = len(images) > MOST_POINTS
        style = {"s": 3 if many else 14, "alpha": 0.12 if many else 0.45, "linewidths": 0, "rasterized": many}
        axes.scatter(images, mean, color=one.colour, **style)
        axes.plot(*binned(images, mean), one.dashes, color=one.colour, label=one.label, marker="o", markersize=3.5)
    _log_counts(axes, np.concatenate([one.group.counts.counts for one in series if one.group.counts is not None]))
    axes.set(xlabel="training images of the class", ylabel="test accuracy, %", ylim=(-0.03, 1.03))
    percent_axis(axes)
    legend_below(axes)
    return figure


def _log_counts(axes: Axes, counts: np.ndarray) -> None:
    """Training images on a logarithmic axis, unless they are nearly as many in all classes."""
    if counts.max() >= 3 * counts.min():
        axes.set_xscale("log")
        subs = (1.0,) if counts.max() >= 200 * counts.min() else (1.0, 2.0, 5.0)
        axes.xaxis.set_major_locator(LogLocator(subs=subs))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def binned(images: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of `values` over at most 12 groups of classes with about as many classes each, at their mean log count."""
    order = np.argsort(images, kind="stable")
    parts = [part for part in np.array_split(order, min(COUNT_BINS, max(1, len(order) // 2))) if len(part)]
    centres = np.array([np.exp(np.log(np.maximum(images[part], 1)).mean()) for part in parts])
    return centres, np.array([values[part].mean() for part in parts])


def shots(series: Sequence[Series]) -> Figure:
    """Test accuracy of all images and of many-, medium- and few-shot classes side by side."""
    figure, axes = new_figure("Accuracy by shots")
    keys = {"top1": "all images", "many": "many-shot", "medium": "medium-shot", "few": "few-shot"}
    shown = [key for key in keys if any(v is not None for one in series for v in one.group.values(key))]
    width = 0.8 / len(series)
    for position, one in enumerate(series):
        for place, key in enumerate(shown):
            values = [v for v in one.group.values(key) if v is not None]
            if not values:
                continue
            x = place - 0.4 + width * (position + 0.5)
            axes.bar(x, np.mean(values), width * 0.92, color=one.colour, label=one.label if place == 0 else None)
            if len(values) > 1:
                axes.errorbar(x, np.mean(values), np.std(values, ddof=1), color=INK, capsize=2, linewidth=1)
            if len(series) <= 2:
                top = np.mean(values) + (np.std(values, ddof=1) if len(values) > 1 else 0)
                axes.text(x, top + 0.015, f"{100 * np.mean(values):.1f}", ha="center", va="bottom", fontsize=TEXT - 1)
    axes.set_xticks(range(len(shown)), [keys[key] for key in shown])
    axes.set(ylabel="test accuracy, %", ylim=(0, 1.09))
    axes.grid(visible=False, axis="x")
    percent_axis(axes)
    legend_below(axes)
    return figure


def accuracy_of_classes(series: Sequence[Series]) -> Figure:
    """Test accuracy of every class by name, the largest class first; for at most 60 classes."""
    counts = series[0].group.counts
    assert counts is not None
    order = by_count(counts)
    figure, axes = new_figure("Accuracy of every class", height=1.0 + 0.185 * len(order) + 0.12 * len(series))
    places = np.arange(len(order))
    for place, one in enumerate(series):
        accuracy = one.group.class_accuracy
        assert accuracy is not None
        mean, deviation = accuracy[0][order], accuracy[1][order]
        shift = 0.34 * ((place + 0.5) / len(series) - 0.5) if len(series) > 1 else 0
        if not np.isnan(deviation).all():
            axes.hlines(places + shift, mean - deviation, mean + deviation, color=one.colour, linewidth=1.2, alpha=0.6)
        axes.scatter(mean, places + shift, s=20, color=one.colour, label=one.label, edgecolors=SURFACE, linewidths=0.6)
    axes.set_yticks(places, [f"{shortened(counts.names[c])}  ({counts.counts[c]:,})" for c in order])
    axes.set(xlabel="test accuracy, %", xlim=(-0.03, 1.03), ylim=(len(order) - 0.4, -0.6))
    percent_axis(axes, "x")
    legend_below(axes)
    return figure


def curve(series: Sequence[Series], title: str, kind: str, key: str, label: str) -> Figure | None:
    """A number of the log over the iterations, as the mean over seeds with its range; None where no run logged it."""
    figure, axes = new_figure(title)
    drawn = 0
    for one in series:
        iterations, mean, low, high = over_seeds(one.group.runs, kind, key)
        if not len(iterations):
            continue
        drawn += 1
        axes.plot(iterations, mean, one.dashes, color=one.colour, label=one.label, **_marked(iterations))
        if (high > low).any():
            axes.fill_between(iterations, low, high, color=one.colour, alpha=0.15, linewidth=0)
    if not drawn:
        return None
    axes.set(xlabel="iteration", ylabel=label)
    _whole_iterations(axes)
    if kind == "evaluation":
        percent_axis(axes)
    legend_below(axes)
    return figure


def over_seeds(
    runs: Sequence[Run], kind: str, key: str, at_most: int = 400
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Iterations, and mean, smallest and largest value of a number of the log over the runs that have it there.

    Longer logs are means over as many neighbours as leave `at_most` points.
    """
    found: dict[int, list[float]] = {}
    for run in runs:
        lines = [line for line in run.lines(kind) if isinstance(line.get(key), (int, float))]
        step = -(-len(lines) // at_most) or 1
        for start in range(0, len(lines), step):
            part = lines[start : start + step]
            found.setdefault(part[-1]["iteration"], []).append(sum(line[key] for line in part) / len(part))
    iterations = np.array(sorted(found), dtype=np.int64)
    values = [found[i] for i in iterations.tolist()]
    mean, low, high = (np.array([of(v) for v in values]) for of in (np.mean, np.min, np.max))
    return iterations, mean, low, high


def of_classes(group: Group, name: str, title: str, label: str, neutral: float | None = None) -> Figure | None:
    """A value of every class over the validations: a line a class, or where there are many, how each kind lies.

    neutral: a value that is marked. None where the method has no such value.
    """
    counts, history = group.counts, class_history(group, name)
    if history is None or counts is None:
        return None
    iterations, values = history
    figure, axes = new_figure(title)
    if neutral is not None:
        axes.axhline(neutral, color=MUTED, linewidth=0.9, linestyle=":")
    for shot, mask in counts.shot_masks().items():
        if not mask.any():
            continue
        inside, colour = values[:, mask], SHOTS[shot]
        if counts.num_classes <= MOST_CLASSES:
            axes.plot(iterations, inside, color=colour, linewidth=0.8, alpha=0.55)
        else:
            low, high = np.nanpercentile(inside, [10, 90], axis=1)
            axes.fill_between(iterations, low, high, color=colour, alpha=0.16, linewidth=0)
        mean = np.nanmean(inside, axis=1)
        axes.plot(iterations, mean, color=colour, linewidth=2, label=f"{shot}-shot", **_marked(iterations))
    axes.set(xlabel="iteration", ylabel=label, xlim=(None, iterations[-1]))
    _whole_iterations(axes)
    _name_ends(axes, iterations, values, counts)
    legend_below(axes, columns=3)
    return figure


def class_history(group: Group, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """A value of every class at the validations that all runs of a group have: iterations (T,) and means (T, C)."""
    classes = () if group.counts is None else (group.counts.num_classes,)
    of_runs = [
        {r.iteration: r.values[name] for r in run.history if name in r.values and r.values[name].shape == classes}
        for run in group.runs
    ]
    of_runs = [of_run for of_run in of_runs if of_run]
    if not of_runs:
        return None
    iterations = sorted(set.intersection(*map(set, of_runs)))
    if not iterations:
        return None
    return np.array(iterations), np.mean([[of_run[i] for i in iterations] for of_run in of_runs], axis=0, dtype=float)


def _name_ends(axes: Axes, iterations: np.ndarray, values: np.ndarray, counts: ClassCounts) -> None:
    """Write the names of the classes with the highest and the lowest value at the end beside it."""
    last = values[-1]
    known = np.flatnonzero(~np.isnan(last))
    order = known[np.argsort(last[known], kind="stable")]
    chosen = order if len(order) <= 2 * NAMED_ENDS else np.concatenate([order[:NAMED_ENDS], order[-NAMED_ENDS:]])
    if not len(chosen):
        return
    if counts.num_classes > MOST_CLASSES:
        masks = counts.shot_masks()
        for c in chosen:
            shot = next(name for name, mask in masks.items() if mask[c])
            axes.plot(iterations, values[:, c], color=SHOTS[shot], linewidth=0.8, alpha=0.7)
    low, high = axes.get_ylim()
    for c, y in zip(chosen, spaced(last[chosen].tolist(), 0.07 * (high - low)), strict=True):
        axes.annotate(
            shortened(counts.names[c], 16),
            (iterations[-1], last[c]),
            (1.03, y),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=TEXT - 1,
            color=MUTED,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 1},
        )
    axes.set_ylim(low, high)


def _marked(iterations: np.ndarray) -> dict[str, Any]:
    """Points on a curve of few."""
    return {"marker": "o", "markersize": 3} if len(iterations) <= 12 else {}


def _whole_iterations(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def confusion_matrix(confusion: Confusion, title: str) -> Figure:
    """What the test images of each row were taken for: the share of the row as a colour, as a number where it fits."""
    rows = len(confusion.names)
    side = max(WIDTH, 1.8 + 0.17 * rows)
    figure, axes = new_figure(title, width=side, height=side)
    axes.imshow(np.nan_to_num(confusion.share), cmap=HEAT, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    names = [shortened(name, 18) for name in confusion.names]
    axes.set_xticks(range(rows), names, rotation=90)
    axes.set_yticks(range(rows), names)
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for row in confusion.edges.values():
        if row > 0:
            axes.axhline(row - 0.5, color=MUTED, linewidth=0.8)
            axes.axvline(row - 0.5, color=MUTED, linewidth=0.8)
    if rows <= NAMED_CELLS:
        for (row, column), share in np.ndenumerate(confusion.share):
            if share >= 0.005:
                colour = ON_COLOUR if share > 0.6 else INK
                place = {"ha": "center", "va": "center", "fontsize": TEXT - 1, "gid": f"on-fill-{row}-{column}"}
                axes.text(column, row, f"{100 * share:.0f}", color=colour, **place)
    axes.set(xlabel="taken for", ylabel="test images of")
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    return figure


def reliability(calibration: Calibration, title: str) -> Figure:
    """Accuracy against confidence in 15 bins; below, how many images each bin has."""
    figure, axes = new_figure(title, height=3.6)
    width = 1 / ECE_BINS
    centres = (np.arange(ECE_BINS) + 0.5) * width
    share = calibration.images / calibration.images.sum()
    axes.bar(
        centres, np.nan_to_num(calibration.accuracy), width * 0.9, color=SHOTS["many"], alpha=0.75, label="accuracy"
    )
    axes.bar(
        centres, -0.25 * share / share.max(), width * 0.9, color=MUTED, alpha=0.5, label="share of images, downwards"
    )
    some = calibration.images > 0
    axes.plot(calibration.confidence[some], calibration.accuracy[some], "o", color=INK, markersize=3.5)
    axes.plot([0, 1], [0, 1], ":", color=MUTED, linewidth=1.2, label="well calibrated")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.set(xlabel="confidence, %", ylabel="test accuracy, %", xlim=(0, 1), ylim=(-0.28, 1.02))
    axes.set_yticks(np.arange(0, 1.01, 0.2))
    percent_axis(axes)
    percent_axis(axes, "x")
    legend_below(axes)
    return figure


def times(groups: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """Where the seconds of each group's runs went, as shares of the whole."""
    figure, axes = new_figure("Where the time went", height=1.25 + 0.34 * len(groups))
    parts = list(dict.fromkeys(part for _, seconds in groups for part in seconds))
    for place, (_, seconds) in enumerate(groups):
        left, total = 0.0, sum(seconds.values())
        for number, part in enumerate(parts):
            share = seconds.get(part, 0.0) / total
            axes.barh(
                place,
                share,
                0.62,
                left=left,
                color=colour_of(number),
                edgecolor=SURFACE,
                linewidth=0.8,
                label=part if place == 0 else None,
            )
            if share > 0.08:
                style: dict[str, Any] = {"ha": "center", "va": "center", "color": SURFACE}
                style["gid"] = f"on-fill-{place}-{number}"
                axes.text(left + share / 2, place, f"{100 * share:.0f}", **style)
            left += share
    axes.set_yticks(range(len(groups)), [shortened(name, 24) for name, _ in groups])
    axes.set(xlabel="% of the time", xlim=(0, 1), ylim=(len(groups) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    percent_axis(axes, "x")
    legend_below(axes, columns=3)
    return figure


def weights_of_run(run: Run) -> Figure:
    """The class weights of one run; ValueError when its method has none."""
    figure = of_classes(
        Group([run]), "weight", f"{shortened(run.folder.name, 40)}: class weights", "weight", neutral=1.0
    )
    if figure is None:
        raise ValueError(f"{run.folder} has no class weights: its method learns none, or it was never evaluated")
    return figure
