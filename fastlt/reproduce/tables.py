"""The tables: their cells, the published numbers, and the recipe and settings of each cell (paper_tables.yaml)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastlt.names import pick
from fastlt.recipe.locations import SHIPPED

PAPER = Path(__file__).with_name("paper_tables.yaml")


@dataclass
class Cell:
    """One number of a table and what reproduces it.

    paper: the published number, None when there is none. recipe: stem of a file of recipes/. overrides: words that make
    the recipe this cell's; short: further ones at `--scale short`. metric: key of result.json. problem: why it was not
    run, None when it can be. results: one result.json a seed, in order. members: the cells that an ensemble puts
    together; `recipe` then names all of theirs, and `overrides` holds all of theirs.
    """

    row: str
    column: str
    paper: float | None
    recipe: str
    overrides: list[str]
    metric: str
    short: list[str] = field(default_factory=list)
    problem: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    members: list[Cell] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return SHIPPED / f"{self.recipe}.yaml"

    def percentages(self) -> list[float]:
        """Our value under each seed that has one."""
        return [100 * r[self.metric] for r in self.results if r[self.metric] is not None]

    def as_row(self) -> dict[str, Any]:
        """What the CSV and JSON files say of the cell."""
        ours = self.percentages()
        mean = statistics.mean(ours) if ours else None
        return {
            "row": self.row,
            "column": self.column,
            "recipe": self.recipe,
            "overrides": " ".join(self.overrides),
            "paper": self.paper,
            "ours": mean,
            "std": statistics.stdev(ours) if len(ours) > 1 else None,
            "seeds": len(ours),
            "difference": None if mean is None or self.paper is None else mean - self.paper,
            "train_s": statistics.mean(r["train_s"] for r in self.results) if self.results else None,
            "device": " + ".join(sorted({r["device"] for r in self.results})) or None,
            "runs": " ".join(r["name"] for r in self.results),
            "not_run": self.problem,
        }


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
            rest = (overrides, column.get("metric", "top1"), [*table.get("short", []), *row.get("short", [])])
            members = [Cell(*place, recipe, *rest) for recipe in recipes]
            cells.append(members[0] if len(members) == 1 else Cell(*place, "+".join(recipes), *rest, members=members))
    return table["title"], cells


def chosen(cells: list[Cell], rows: Sequence[str] | None, columns: Sequence[str] | None) -> list[Cell]:
    """The cells of these rows and columns, all when None; ValueError for a name that the table does not have."""
    for kind, names, known in (("row", rows, {c.row for c in cells}), ("column", columns, {c.column for c in cells})):
        for name in names or []:
            pick(kind, name, dict.fromkeys(known))
    return [c for c in cells if (not rows or c.row in rows) and (not columns or c.column in columns)]
