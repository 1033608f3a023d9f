"""The sections of a report, from groups of runs: one function each, and the tables that are written as files alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastlt.recipe import is_harmless
from fastlt.recipe.schema import values
from fastlt.report import figures
from fastlt.report.blocks import (
    Block,
    CodeBlock,
    Column,
    FigureBlock,
    HeadingBlock,
    Picture,
    PicturesBlock,
    Section,
    TableBlock,
    TextBlock,
)
from fastlt.report.calibration import calibration
from fastlt.report.confusion import MOST_CLASSES, by_count, confused_pairs, confusion, where_errors_go
from fastlt.report.figures import Series
from fastlt.report.runs import Run
from fastlt.report.seeds import Group, deviation
from fastlt.report.wrong_images import most_confidently_wrong, picture, rare_classes, test_images
from fastlt.run.predictions import Predictions
from fastlt.state import ClassCounts
from fastlt.typed_yaml import to_tree

SHOTS = ("many", "medium", "few")
METRICS = {
    "top-1": "top1",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "top-5": "top5",
    "macro-F1": "macro_f1",
    "ECE": "ece",
}


def all_sections(series: Sequence[Series], warnings: Sequence[str]) -> list[Section]:
    """The sections of a report that have something to show. warnings: about runs that are not shown, or not merged."""
    sections = [
        overview(series, warnings),
        accuracy(series),
        curves(series),
        weights(series),
        confusions(series),
        reliabilities(series),
        wrong_images(series),
        time(series),
        recipes(series),
    ]
    return [section for section in sections if section.blocks]


def measured(values: Sequence[Any], scale: float = 1.0) -> tuple[float, float] | None:
    """Mean and standard deviation as a cell; None where a value is missing."""
    if not values or any(value is None for value in values):
        return None
    numbers = scale * np.array(values, dtype=float)
    return float(numbers.mean()), float(deviation(numbers[:, None])[0])


def overview(series: Sequence[Series], warnings: Sequence[str]) -> Section:
    """What was measured, in one table; and the state of each run folder."""
    columns = [Column("run"), Column("seeds", 0), *(Column(f"{name} %", 2) for name in METRICS)]
    columns += [Column("validation top-1 %", 2), Column("training s", 1)]
    rows = [
        [
            one.name,
            len(one.group.finished),
            *(measured(one.group.values(key), 100) for key in METRICS.values()),
            measured(one.group.values("validation_top1"), 100),
            measured(one.group.values("train_s")),
        ]
        for one in series
        if one.group.finished
    ]
    blocks: list[Block] = []
    if rows:
        text = "Test accuracy. Mean ± sample standard deviation over seeds where a run has several."
        blocks += [TextBlock(text), TableBlock("metrics", columns, rows)]
    blocks += [TextBlock(text, warning=True) for text in warnings]
    known = [one.group.counts for one in series if one.group.counts is not None]
    shots = list(dict.fromkeys(str(to_tree(counts.shots)) for counts in known))
    if len(shots) > 1:
        text = (
            f"Runs have different data.shots, {' and '.join(shots)}: many, medium and few are not of the same classes."
        )
        blocks.append(TextBlock(text, warning=True))
    runs = [run for one in series for run in one.group.runs]
    blocks += [TextBlock(f"{run.folder}: {text}", warning=True) for run in runs for text in run.damage]
    return Section("Overview", [*blocks, run_table(series)])


def run_table(series: Sequence[Series]) -> TableBlock:
    """A row a run folder, finished or not."""
    columns = [
        Column("folder"),
        Column("run"),
        Column("seed", 0),
        Column("state"),
        *(Column(f"{m} %", 2) for m in METRICS),
    ]
    columns += [Column("tested model"), Column("device"), Column("iterations", 0)]
    rows = []
    for one in series:
        for run in one.group.runs:
            result = run.result or {}
            metrics = [None if result.get(key) is None else 100 * result[key] for key in METRICS.values()]
            rows.append(
                [
                    str(run.folder),
                    one.name,
                    run.recipe.seed,
                    run.status,
                    *metrics,
                    tested_model(result),
                    result.get("device"),
                    result.get("iterations"),
                ]
            )
    return TableBlock("runs", columns, rows, title="Run folders")


def tested_model(result: dict[str, Any]) -> str | None:
    """Which model of a run was tested."""
    iteration = result.get("selected_iteration", result.get("best_iteration"))
    return None if iteration is None else f"{result.get('select', 'best')}, iteration {iteration}"


def by_data(series: Sequence[Series]) -> list[list[Series]]:
    """Those of one list of classes with the same training images and shot groups together."""
    parts: list[list[Series]] = []
    for one in series:
        counts = one.group.counts
        if counts is None:
            continue
        for part in parts:
            other = part[0].group.counts
            assert other is not None
            same_classes = other.names == counts.names and np.array_equal(other.counts, counts.counts)
            if same_classes and other.shots == counts.shots:
                part.append(one)
                break
        else:
            parts.append([one])
    return parts


def accuracy(series: Sequence[Series]) -> Section:
    """Test accuracy by training images, by shots and by class."""
    finished = [one for one in series if one.group.finished]
    blocks: list[Block] = []
    if not finished:
        return Section("Accuracy", blocks)
    parts = by_data(finished)
    for number, part in enumerate(parts):
        counts = part[0].group.counts
        assert counts is not None
        tail = f"_{number + 1}" if len(parts) > 1 else ""
        span = f"{counts.counts.max():,} to {counts.counts.min():,} training images"
        if len(parts) > 1:
            blocks.append(HeadingBlock(", ".join(one.name for one in part)))
        members = {name: int(mask.sum()) for name, mask in counts.shot_masks().items()}
        shots = ", ".join(f"{n:,} {name}-shot" for name, n in members.items() if n)
        text = f"{counts.num_classes:,} classes with {span}: {shots}, with shots {counts.shots_text}."
        blocks.append(TextBlock(text))
        blocks.append(figure(f"accuracy_by_count{tail}", figures.accuracy_by_count(part)))
        blocks.append(figure(f"accuracy_by_shots{tail}", figures.shots(part)))
        if counts.num_classes <= MOST_CLASSES:
            blocks.append(figure(f"accuracy_of_classes{tail}", figures.accuracy_of_classes(part)))
        blocks.append(class_table(f"classes{tail}", part))
    return Section("Accuracy", blocks)


def figure(name: str, drawn: Any) -> FigureBlock:
    """A block of a figure, which is described by its title."""
    return FigureBlock(name, drawn, drawn.axes[0].get_title(loc="left").replace(r"\$", "$"))


def class_table(name: str, part: Sequence[Series]) -> TableBlock:
    """A row a class: training images, shots, and of each group accuracy, weight and difficulty at the end."""
    counts = part[0].group.counts
    assert counts is not None
    shot_of = np.empty(counts.num_classes, dtype=object)
    for shot, mask in counts.shot_masks().items():
        shot_of[mask] = shot
    columns = [Column("class"), Column("training images", 0), Column("shots")]
    cells: list[list[Any]] = [list(counts.names), counts.counts.tolist(), shot_of.tolist()]
    for one in part:
        of = f", {one.name}" if len(part) > 1 else ""
        mean, spread = one.group.class_accuracy or (None, None)
        assert mean is not None
        assert spread is not None
        columns.append(Column(f"test accuracy %{of}", 1))
        cells.append(list(zip((100 * mean).tolist(), (100 * spread).tolist(), strict=True)))
        for key in ("weight", "difficulty"):
            values = one.group.last_value(key)
            if values is not None:
                columns.append(Column(f"{key}{of}", 3))
                cells.append(values.tolist())
    rows = [[column[c] for column in cells] for c in by_count(counts)]
    return TableBlock(name, columns, rows, title="All classes", search=True)


def curves(series: Sequence[Series]) -> Section:
    """Training loss, learning rate and validation accuracy over the iterations."""
    drawn = {
        "curve_loss": figures.curve(series, "Training loss", "train", "loss", "loss"),
        "curve_validation": figures.curve(series, "Validation, all images", "evaluation", "top1", "accuracy, %"),
        "curve_validation_few": figures.curve(series, "Validation, few-shot", "evaluation", "few", "accuracy, %"),
        "curve_lr": figures.curve(series, "Learning rate", "train", "lr", "learning rate"),
    }
    blocks: list[Block] = [figure(name, f) for name, f in drawn.items() if f is not None]
    several = any(len(one.group.runs) > 1 for one in series)
    if blocks and several:
        blocks.insert(0, TextBlock("Lines are means over seeds, bands reach from the lowest to the highest seed."))
    return Section("Training", blocks)


VALUES_OF_CLASSES = {
    "weight": ("Weights of the classes", "weight", 1.0),
    "difficulty": ("Difficulties of the classes", "difficulty", None),
    "meta_accuracy": ("Accuracy that the weights are made from", "accuracy, 0 to 1", None),
    "sampling_rate": ("Sampling rates of the classes", "share of draws", None),
    "scale": ("Scales of the classes", "scale", 1.0),
    "radius": ("Radii of the classes", "radius", None),
}


def weights(series: Sequence[Series]) -> Section:
    """Weights, difficulties and their like over the iterations, for each group whose method has them."""
    blocks: list[Block] = []
    for one in series:
        drawn = []
        for name, (title, label, neutral) in VALUES_OF_CLASSES.items():
            made = figures.of_classes(one.group, name, title, label, neutral)
            if made is not None:
                drawn.append(figure(f"{name}_{one.file}", made))
        if drawn:
            blocks += [HeadingBlock(one.name), *drawn]
    if blocks:
        text = (
            "At each validation. Thick lines are means. The classes with the highest and the lowest value at the end "
            f"are named. With more than {MOST_CLASSES} classes, bands hold the middle 80 % of each kind of class."
        )
        blocks.insert(0, TextBlock(text))
    return Section("Weights and difficulties", blocks)


def without_predictions(series: Sequence[Series]) -> list[Block]:
    """What to do about finished runs that keep no predictions."""
    missing = [run.folder for one in series for run in one.group.finished if not run.predictions]
    if not missing:
        return []
    some = ", ".join(str(folder) for folder in missing[:5]) + (", …" if len(missing) > 5 else "")
    text = f"Not kept by {some}: what was predicted for each image. Where the data are there, add --measure: "
    return [TextBlock(f"{text}`fastlt report {missing[0]} --measure --out report.html`.", warning=True)]


def predicted(series: Sequence[Series]) -> Iterator[tuple[Series, list[Predictions], ClassCounts]]:
    """Those with predictions, these of the test images of each run, and the training images of the classes."""
    for one in series:
        found, counts = [run.predictions["test"] for run in one.group.predicted], one.group.counts
        if found:
            assert counts is not None, "a finished run says how many images its classes have"
            yield one, found, counts


def confusions(series: Sequence[Series]) -> Section:
    """Which classes are taken for which."""
    blocks = without_predictions(series)
    for one, predictions, counts in predicted(series):
        name = one.file
        title = "What test images were taken for, %"
        blocks.append(HeadingBlock(one.name))
        text = "The classes with the most training images come first. Colours go with the square root of the share."
        if counts.num_classes > MOST_CLASSES:
            text = f"The {counts.num_classes:,} classes in groups of like training-set size. {text}"
        blocks.append(TextBlock(text))
        blocks.append(figure(f"confusion_{name}", figures.confusion_matrix(confusion(predictions, counts), title)))
        kinds = where_errors_go(predictions, counts)
        columns = [Column("test images of"), Column("right %", 1), *(Column(f"taken for {s} %", 1) for s in SHOTS)]
        rows = [[f"{kind}-shot classes", *(100 * share for share in shares.values())] for kind, shares in kinds]
        blocks.append(TableBlock(f"errors_{name}", columns, rows, title="Where errors go", beside=True))
        columns = [Column("test images of"), Column("taken for"), Column("images", 1), Column("% of the class", 1)]
        columns += [Column("training images", 0), Column("training images of the other", 0)]
        rows = [
            [
                counts.names[pair.true],
                counts.names[pair.taken_for],
                pair.images,
                100 * pair.share,
                int(counts.counts[pair.true]),
                int(counts.counts[pair.taken_for]),
            ]
            for pair in confused_pairs(predictions, counts.num_classes)
        ]
        blocks.append(TableBlock(f"confused_pairs_{name}", columns, rows, title="Most confused pairs", search=True))
    return Section("Confusion", blocks)


def reliabilities(series: Sequence[Series]) -> Section:
    """Reliability diagrams with the expected calibration error."""
    blocks = without_predictions(series)
    drawn = []
    for one, predictions, _ in predicted(series):
        made = calibration(predictions)
        error = Column("", 2).text(measured(made.errors, 100))
        title = f"{one.label}: ECE {error} %"
        drawn.append(figure(f"reliability_{one.file}", figures.reliability(made, title)))
    if drawn:
        text = (
            "Test images in 15 bins by the probability of the likeliest class. A bar below the dotted line: the model "
            "is surer than it is right. ECE is the mean distance, each image counting the same."
        )
        blocks = [TextBlock(text), *blocks, *drawn]
    return Section("Reliability", blocks)


def wrong_images(series: Sequence[Series]) -> Section:
    """The most confidently wrong test images of rare classes."""
    blocks = without_predictions(series)
    for one, predictions, counts in predicted(series):
        rare, kind = rare_classes(counts)
        wrong = most_confidently_wrong(predictions, rare)
        blocks.append(HeadingBlock(one.name))
        if not wrong:
            blocks.append(TextBlock(f"No test image of the {kind} was taken for another class."))
            continue
        text = f"Test images of the {kind}, at most three of one class, by the probability of the wrong class."
        blocks.append(TextBlock(text))
        images = None
        try:
            images = test_images(one.group.runs[0].recipe.data, predictions[0].labels)
        except (ValueError, OSError) as error:
            blocks.append(TextBlock(f"Without pictures: {' '.join(str(error).split())}", warning=True))
        pictures, rows, unread = [], [], []
        for found in wrong:
            true, taken_for = counts.names[found.true], counts.names[found.taken_for]
            if images is not None:
                lines = [f"taken for {taken_for}", f"{100 * found.probability:.0f} %"]
                if len(predictions) > 1:
                    lines[1] += f", {found.seeds} of {len(predictions)} seeds"
                try:
                    pictures.append(Picture(*picture(images(found.index)), true, lines))
                except (ValueError, OSError) as error:
                    unread.append(f"test image {found.index}: {' '.join(str(error).split())}")
            number = int(counts.counts[found.true])
            rows.append([true, taken_for, 100 * found.probability, found.seeds, number, found.index])
        blocks += [TextBlock(f"Without a picture: {text}", warning=True) for text in unread]
        columns = [Column("test image of"), Column("taken for"), Column("probability %", 1), Column("seeds", 0)]
        columns += [Column("training images", 0), Column("position in the test split", 0)]
        table = TableBlock(f"wrong_images_{one.file}", columns, rows, title="These images", folded=bool(pictures))
        blocks += [*([PicturesBlock(pictures)] if pictures else []), table]
    return Section("Confidently wrong", blocks)


def seconds_of(group: Group) -> dict[str, float]:
    """The mean over seeds of the seconds that went into each part of a run."""
    parts: dict[str, list[float]] = {}
    for result in group.results:
        waited = result["train_s"] * result["data_wait_share"]
        whole = {"computing": result["train_s"] - waited, "waiting for data": waited, **result.get("aside_s", {})}
        for part, seconds in whole.items():
            parts.setdefault(part, []).append(seconds)
    return {part: sum(seconds) / len(group.results) for part, seconds in parts.items()}


def time(series: Sequence[Series]) -> Section:
    """Throughput, and what the time went into."""
    finished = [one for one in series if one.group.finished]
    if not finished:
        return Section("Time", [])
    seconds = [(one.name, seconds_of(one.group)) for one in finished]
    parts = list(dict.fromkeys(part for _, of_group in seconds for part in of_group))
    columns = [Column("run"), Column("img/s in training", 0), *(Column(f"{part}, s", 1) for part in parts)]
    columns += [Column("device"), Column("processes", 0)]
    rows = []
    for one, (name, of_group) in zip(finished, seconds, strict=True):
        devices = ", ".join(dict.fromkeys(str(d) for d in one.group.values("device")))
        processes = measured(one.group.values("processes"))
        speed = measured(one.group.values("img_s"))
        rows.append([name, speed, *(of_group.get(part) for part in parts), devices, processes and processes[0]])
    blocks: list[Block] = [figure("time", figures.times(seconds)), TableBlock("time", columns, rows)]
    if any("aside_s" not in result for one in finished for result in one.group.results):
        text = "Runs of earlier versions did not time validating, saving, compiling and testing."
        blocks.append(TextBlock(text))
    return Section("Time", blocks)


def recipes(series: Sequence[Series]) -> Section:
    """In which keys the recipes differ, and each recipe whole."""
    settings = [values(one.group.runs[0].recipe) for one in series]
    keys = dict.fromkeys(key for of_group in settings for key in of_group)
    rows = []
    for key in keys:
        found = [of_group.get(key) for of_group in settings]
        field = next(value.field for value in found if value is not None)
        shown = ["-" if value is None else plain(value.value) for value in found]
        if len(set(shown)) > 1 and not is_harmless(field) and key != ("seed",):
            rows.append([".".join(key), *shown])
    blocks: list[Block] = []
    if len(series) > 1:
        if rows:
            columns = [Column("key"), *(Column(one.name) for one in series)]
            blocks.append(TableBlock("recipe_differences", columns, rows, title="Differences"))
        else:
            blocks.append(TextBlock("The recipes differ in nothing that changes a result."))
    for one in series:
        run = one.group.runs[0]
        blocks.append(CodeBlock(f"The whole recipe of {run.folder}", run.recipe.to_yaml()))
    return Section("Recipes", blocks)


def plain(value: Any) -> str:
    """A value of a recipe as YAML has it on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def numbers_alone(series: Sequence[Series]) -> list[TableBlock]:
    """The numbers behind figures that no table of the page has."""
    runs = [run for one in series for run in one.group.runs]
    tables = [curve_table(runs), history_table(runs)]
    for one, predictions, _ in predicted(series):
        made = calibration(predictions)
        columns = [Column("bin", 0), Column("confidence", 6), Column("accuracy", 6), Column("images", 0)]
        rows = [[k, *row] for k, row in enumerate(zip(made.confidence, made.accuracy, made.images, strict=True))]
        tables.append(TableBlock(f"reliability_{one.file}", columns, rows))
    return [table for table in tables if table.rows]


def curve_table(runs: Sequence[Run]) -> TableBlock:
    """Every number of every log, a row each."""
    columns = [Column(title) for title in ("folder", "kind", "stage")]
    columns += [Column("iteration", 0), Column("name"), Column("value", 6)]
    rows = []
    for run in runs:
        for kind in ("train", "evaluation"):
            for line in run.lines(kind):
                numbers = {k: v for k, v in line.items() if isinstance(v, (int, float)) and k != "iteration"}
                place = [str(run.folder), kind, line.get("stage", ""), line["iteration"]]
                rows += [[*place, name, value] for name, value in numbers.items()]
    return TableBlock("curves", columns, rows)


def history_table(runs: Sequence[Run]) -> TableBlock:
    """The means of the values of classes over many-, medium- and few-shot classes at every validation."""
    columns = [Column("folder"), Column("iteration", 0), Column("value"), *(Column(shot, 6) for shot in SHOTS)]
    rows = []
    for run in runs:
        masks = run.counts.shot_masks() if run.counts is not None else {}
        for record in run.history:
            for name, of_classes in record.values.items():
                means = [mean_of(of_classes, masks.get(shot)) for shot in SHOTS]
                rows.append([str(run.folder), record.iteration, name, *means])
    return TableBlock("class_history", columns, rows)


def mean_of(of_classes: np.ndarray, mask: np.ndarray | None) -> float | None:
    """The mean over the classes of a mask that have a value."""
    inside = of_classes[mask] if mask is not None else of_classes[:0]
    inside = inside[~np.isnan(inside)]
    return float(inside.mean()) if len(inside) else None
