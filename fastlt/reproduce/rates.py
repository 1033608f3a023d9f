"""Which learning rate is best on validation: rows of a table at several rates."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from fastlt.markdown_table import markdown_table
from fastlt.recipe import load_recipe
from fastlt.reproduce.tables import Cell


def at_rates(cells: Sequence[Cell], rates: Sequence[float], scale: str) -> list[Cell]:
    """Each cell at each learning rate of its first stage, rate by rate."""
    return [_at_rate(cell, rate, scale) for cell in cells for rate in rates]


def _at_rate(cell: Cell, rate: float, scale: str) -> Cell:
    if cell.members:
        raise ValueError(f"--rates: {cell.row} is an ensemble, which has no learning rate; choose other --rows")
    first = next(iter(load_recipe(cell.path, cell.overrides).stages))
    scaled = {**cell.scaled, scale: [*cell.scaled.get(scale, []), f"stages.{first}.lr={rate:g}"]}
    return replace(cell, scaled=scaled, paper=None, results={}, rate=rate)


def rates_table(cells: Sequence[Cell]) -> str:
    """Validation accuracy of each cell at each rate as Markdown, the best of each cell marked; no test number."""
    sentence = (
        "Top-1 on validation in %, mean ± sample standard deviation over seeds. The error is the standard error of one "
        "run, by the number of validation images."
    )
    rows = []
    for row, column in dict.fromkeys((cell.row, cell.column) for cell in cells):
        mine = [cell for cell in cells if (cell.row, cell.column) == (row, column)]
        best = max(mine, key=lambda cell: statistics.mean(_validation(cell) or [-1.0]))
        complete = all(len(cell.results) >= cell.wanted for cell in mine)
        rows += [_fields(cell, chosen=complete and cell is best) for cell in mine]
    table = markdown_table(("row", "column", "rate", "validation", "error", "seeds", ""), rows)
    return f"{sentence}\n\n{table}\n"


def _fields(cell: Cell, *, chosen: bool) -> list[str]:
    values = _validation(cell)
    shown, error = "", ""
    if values:
        shown = f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        error = f"{100 * max(result['validation_top1_se'] for result in cell.results.values()):.2f}"
    return [
        cell.row,
        cell.column,
        f"{cell.rate or 0:g}",
        shown,
        error,
        str(len(values) or ""),
        "best" if chosen else "",
    ]


def _validation(cell: Cell) -> list[float]:
    return [100 * result["validation_top1"] for result in cell.results.values()]
