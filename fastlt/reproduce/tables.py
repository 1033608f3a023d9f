"""The tables: their cells, the published numbers, and the recipe and settings of each cell (paper_tables.yaml)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastlt.names import pick
from fastlt.recipe.locations import SHIPPED, shipped_recipes
from fastlt.state import ClassCounts, ShotRanks

PAPER = Path(__file__).with_name("paper_tables.yaml")


@dataclass
class Cell:
    """One number of a table and what reproduces it.

    paper: the published number, None when there is none. recipe: stem of a file of recipes/. overrides: words that
    make the recipe this cell's; short: further ones at `--scale short`. metric: key of result.json. shots: the groups
    of the published number, None where they are the recipe's. problem: why it was not run, None when it can be.
    results: one result.json a seed, in order. members: the cells that an ensemble puts together; `recipe` then names
    all of theirs, and `overrides` holds all of theirs.
    """

    row: str
    column: str
    paper: float | None
    recipe: str
    overrides: list[str]
    metric: str
    short: list[str] = field(default_factory=list)
    shots: ShotRanks | None = None
    problem: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    members: list[Cell] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return shipped_recipes().get(self.recipe, SHIPPED / f"{self.recipe}.yaml")

    def percentages(self, shots: ShotRanks | None = None) -> list[float]:
        """Our value under each seed that has one. shots: groups to measure it on, in place of those of the runs."""
        values = [r[self.metric] if shots is None else group_accuracy(r, self.metric, shots) for r in self.results]
        return [100 * value for value in values if value is not None]

    def as_row(self) -> dict[str, Any]:
        """What the CSV and JSON files say of the cell."""
        ours, of_run_groups = self.percentages(self.shots), None
        if ours and self.shots is not None:
            of_run_groups = statistics.mean(self.percentages())
        mean = statistics.mean(ours) if ours else None
        return {
            "row": self.row,
            "column": self.column,
            "recipe": self.recipe,
            "overrides": " ".join(self.overrides),
            "paper": self.paper,
            "ours": mean,
            "ours_by_recipe_shots": of_run_groups,
            "std": statistics.stdev(ours) if len(ours) > 1 else None,
            "seeds": len(ours),
            "difference": None if mean is None or self.paper is None else mean - self.paper,
            "train_s": statistics.mean(r["train_s"] for r in self.results) if self.results else None,
            "device": " + ".join(sorted({r["device"] for r in self.results})) or None,
            "runs": " ".join(r["name"] for r in self.results),
            "not_run": self.problem,
        }


def group_accuracy(result: Mapping[str, Any], group: str, shots: ShotRanks) -> float | None:
    """The mean accuracy of the many-, medium- or few-shot classes of a result.json by other groups than its own."""
    counts = ClassCounts(np.array(result["class_counts"], dtype=np.int64), tuple(result["class_names"]), shots)
    accuracy = [a for a, inside in zip(result["per_class_accuracy"], counts.shot_masks()[group], strict=True) if inside]
    known = [a for a in accuracy if a is not None]
    return statistics.mean(known) if known else None


def table_names(tables: Path = PAPER) -> list[str]:
    """What can be reproduced."""
    return list(yaml.safe_load(tables.read_text(encoding="utf-8")))


def load_table(name: str, tables: Path = PAPER) -> tuple[str, list[Cell]]:
    """Title and cells of a table, row by row; a cell without a number is left out unless the table says `run_all`."""
    table = pick("table", name, yaml.safe_load(tables.read_text(encoding="utf-8")))
    cells = []
    for row in table["rows"]:
        values = row.get("values", [None] * len(table["columns"]))
        for column, value in zip(table["columns"], values, strict=True):
            if value is None and not table.get("run_all", False):
                continue
            overrides = [
                *table.get("overrides", []),
                *column.get("overrides", []),
                *row.get("overrides", []),
                *row.get("by_column", {}).get(column["name"], []),
            ]
            recipes = row.get("ensemble") or [row.get("recipe") or column["recipe"]]
            place = (row["name"], column["name"], value)
            metric, short = column.get("metric", "top1"), [*table.get("short", []), *row.get("short", [])]
            by_rank = "shots" in row and metric in ("many", "medium", "few")
            rest = (overrides, metric, short, ShotRanks(tuple(row["shots"]["ranks"])) if by_rank else None)
            members = [Cell(*place, recipe, *rest) for recipe in recipes]
            cells.append(members[0] if len(members) == 1 else Cell(*place, "+".join(recipes), *rest, members=members))
    return table["title"], cells


def chosen(cells: list[Cell], rows: Sequence[str] | None, columns: Sequence[str] | None) -> list[Cell]:
    """The cells of these rows and columns, all when None; ValueError for a name that the table does not have."""
    for kind, names, known in (("row", rows, {c.row for c in cells}), ("column", columns, {c.column for c in cells})):
        for name in names or []:
            pick(kind, name, dict.fromkeys(known))
    return [c for c in cells if (not rows or c.row in rows) and (not columns or c.column in columns)]
