"""The tables: their cells, the published numbers, and the recipe and settings of each cell (paper_tables.yaml)."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastlt.names import pick
from fastlt.recipe.locations import SHIPPED, shipped_recipes
from fastlt.reproduce.paired import paired_difference
from fastlt.state import ClassCounts, ShotRanks

PAPER = Path(__file__).with_name("paper_tables.yaml")
# The budgets of `--scale`, and what a table says of each.
SCALES = {
    "paper": "the recipes' full length",
    "quick": "one budget for all rows, near convergence",
    "short": "one short budget for all rows",
}


@dataclass
class Cell:
    """One number of a table and what reproduces it.

    paper: the published number, None when there is none. recipe: stem of a file of recipes/, which is `path`.
    overrides: words that make the recipe this cell's. scaled: further ones at a `--scale`, by its name. metric: key of
    result.json. seeds: how many runs the table wants, 0 where it wants none unless the cell is asked for; wanted: how
    many are to be run. rate: the learning rate that is tried, see `fastlt.reproduce.rates`. shots: the groups of the
    published number, None where they are the recipe's. reference: the cell that it is compared with, seed by seed; None
    for none. problem: why it cannot be run, or why a run failed. results: result.json by seed. members: the cells that
    an ensemble puts together; `recipe` then names all of theirs, and `overrides` holds all of theirs.
    """

    row: str
    column: str
    paper: float | None
    recipe: str
    overrides: list[str]
    metric: str = "top1"
    path: Path = Path()
    scaled: Mapping[str, list[str]] = field(default_factory=dict)
    seeds: int = 1
    wanted: int = 1
    rate: float | None = None
    shots: ShotRanks | None = None
    reference: Cell | None = None
    problem: str | None = None
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    members: list[Cell] = field(default_factory=list)

    def label(self, seed: int) -> str:
        """What the user reads of a run of the cell."""
        rate = "" if self.rate is None else f", rate {self.rate:g}"
        return f"{self.row}, {self.column}{rate}, seed {seed}"

    def percentages(self, shots: ShotRanks | None = None) -> dict[int, float]:
        """Our value by seed, where there is one. shots: groups to measure it on, in place of those of the runs."""
        values = {
            seed: result[self.metric] if shots is None else group_accuracy(result, self.metric, shots)
            for seed, result in sorted(self.results.items())
        }
        return {seed: 100 * value for seed, value in values.items() if value is not None}

    def why_not(self) -> str | None:
        """Why it has no number, or not one for each seed that is wanted; None when it has."""
        missing = self.wanted - len(self.results)
        if missing > 0:
            return self.problem or f"{missing} of {self.wanted} seeds have not been run"
        return None if self.percentages() else f"no class is {self.metric}-shot"

    def as_row(self) -> dict[str, Any]:
        """What the CSV and JSON files say of the cell."""
        values, of_run_groups = self.percentages(self.shots), None
        if values and self.shots is not None:
            of_run_groups = statistics.mean(self.percentages().values())
        results = [result for _, result in sorted(self.results.items())]
        mean = _mean(values.values())
        paired = None if self.reference is None else paired_difference(values, self.reference.percentages())
        weights = [result["class_weights"] for result in results if result.get("class_weights")]
        return {
            "row": self.row,
            "column": self.column,
            "recipe": self.recipe,
            "overrides": " ".join(self.overrides),
            "paper": self.paper,
            "ours": mean,
            "ours_by_recipe_shots": of_run_groups,
            "std": statistics.stdev(values.values()) if len(values) > 1 else None,
            "seeds": len(values),
            "difference": None if mean is None or self.paper is None else mean - self.paper,
            "reference": None if self.reference is None else self.reference.row,
            "paired": None if paired is None else paired[0],
            "paired_95": None if paired is None else paired[1],
            **{key: _mean(_percentages(results, key)) for key in ("many", "medium", "few", "ece")},
            "least_weight": _mean(map(min, weights)),
            "largest_weight": _mean(map(max, weights)),
            "select": _all(result.get("select") for result in results),
            "train_s": _mean(result["train_s"] for result in results),
            "wall_s": _mean(result["train_s"] + sum(result.get("aside_s", {}).values()) for result in results),
            "device": _all(device_of(result) for result in results),
            "runs": " ".join(result["name"] for result in results),
            "by_seed": " ".join(f"{seed}:{value:.4f}" for seed, value in values.items()),
            "not_run": self.why_not(),
        }


def _mean(values: Any) -> float | None:
    found = list(values)
    return statistics.mean(found) if found else None


def _percentages(results: Sequence[Mapping[str, Any]], key: str) -> Iterator[float]:
    yield from (100 * result[key] for result in results if result.get(key) is not None)


def _all(words: Any) -> str | None:
    return " + ".join(sorted({word for word in words if word is not None})) or None


def device_of(result: Mapping[str, Any]) -> str:
    """On what a run was trained: a GPU by its name, a CPU too where the result has it, with its threads."""
    if result["device"] != "cpu" or "threads" not in result:
        return result["device"]
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    return f"{result.get('processor') or 'cpu'} ({threads})"


def group_accuracy(result: Mapping[str, Any], group: str, shots: ShotRanks) -> float | None:
    """The mean accuracy of the many-, medium- or few-shot classes of a result.json by other groups than its own."""
    counts = ClassCounts(np.array(result["class_counts"], dtype=np.int64), tuple(result["class_names"]), shots)
    accuracy = [a for a, inside in zip(result["per_class_accuracy"], counts.shot_masks()[group], strict=True) if inside]
    known = [a for a in accuracy if a is not None]
    return statistics.mean(known) if known else None


def table_names() -> list[str]:
    """What can be reproduced."""
    return list(yaml.safe_load(PAPER.read_text(encoding="utf-8")))


def load_table(name: str) -> tuple[str, list[Cell]]:
    """Title and cells of a table, row by row; a cell without a number is left out unless the table says `run_all`."""
    table = pick("table", name, yaml.safe_load(PAPER.read_text(encoding="utf-8")))
    files, cells = shipped_recipes(), []
    for row in table["rows"]:
        values = row.get("values", [None] * len(table["columns"]))
        for column, value in zip(table["columns"], values, strict=True):
            if value is None and not table.get("run_all", False):
                continue
            recipes = row.get("ensemble") or [row.get("recipe") or column["recipe"]]
            cell = _cell(table, row, column, value)
            parts = [replace(cell, recipe=r, path=files.get(r, SHIPPED / f"{r}.yaml")) for r in recipes]
            cells.append(parts[0] if len(parts) == 1 else replace(cell, recipe="+".join(recipes), members=parts))
    by_name = {(cell.row, cell.column): cell for cell in cells}
    for row in table["rows"]:
        for column in table["columns"] if "reference" in row else []:
            by_name[row["name"], column["name"]].reference = by_name[row["reference"], column["name"]]
    return table["title"], cells


def _cell(table: Mapping[str, Any], row: Mapping[str, Any], column: Mapping[str, Any], paper: float | None) -> Cell:
    """A cell without its recipe."""
    metric, seeds = column.get("metric", "top1"), row.get("seeds", table.get("seeds", 1))
    by_rank = "shots" in row and metric in ("many", "medium", "few")
    return Cell(
        row=row["name"],
        column=column["name"],
        paper=paper,
        recipe="",
        overrides=[
            *table.get("overrides", []),
            *column.get("overrides", []),
            *row.get("overrides", []),
            *row.get("by_column", {}).get(column["name"], []),
        ],
        metric=metric,
        scaled={
            scale: [*table.get(scale, []), *_of_column(row.get(scale, []), column["name"], [])] for scale in SCALES
        },
        seeds=_of_column(seeds, column["name"], 0),
        shots=ShotRanks(tuple(row["shots"]["ranks"])) if by_rank else None,
    )


def _of_column(value: Any, column: str, absent: Any) -> Any:
    """A value that may be given by column."""
    return value.get(column, absent) if isinstance(value, dict) else value


def chosen(cells: list[Cell], rows: Sequence[str] | None, columns: Sequence[str] | None) -> list[Cell]:
    """The cells of these rows and columns; without either, those of which the table wants runs.

    ValueError for a name that the table does not have.
    """
    for kind, names, known in (("row", rows, {c.row for c in cells}), ("column", columns, {c.column for c in cells})):
        for name in names or []:
            pick(kind, name, dict.fromkeys(known))
    if not rows and not columns:
        return [c for c in cells if c.seeds > 0]
    return [c for c in cells if (not rows or c.row in rows) and (not columns or c.column in columns)]
