"""The table as Markdown, CSV and JSON, and the listing of what can run."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fastlt.reproduce.tables import Cell
from fastlt.run.checkpoint import write_atomically, write_json


def markdown(title: str, cells: Sequence[Cell], scale: str, seeds: int) -> str:
    """The table as Markdown: a line a cell that was run, then what was not run and why."""
    budget = "the recipes' full length" if scale == "paper" else "one short budget for all"
    devices = sorted({r["device"] for c in cells for r in c.results})
    lines = [f"# {title}", "", f"In %, mean ± sample standard deviation over at most {seeds} seeds; {budget}.", ""]
    lines[2] += f" Trained on {', '.join(devices)}." if devices else ""
    lines += ["| row | column | paper | ours | seeds | difference | training, s |", "|---|---|---|---|---|---|---|"]
    for cell in cells:
        row = cell.as_row()
        if row["ours"] is None:
            continue
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        if row["ours_by_recipe_shots"] is not None and abs(row["ours_by_recipe_shots"] - row["ours"]) >= 0.005:
            spread += f" ({row['ours_by_recipe_shots']:.2f} by the recipe's groups)"
        difference = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
        lines.append(
            f"| {cell.row} | {cell.column} | {number(cell.paper, '.2f')} | {row['ours']:.2f}{spread} | {row['seeds']} "
            f"| {difference} | {row['train_s']:.0f} |"
        )
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if cell.problem is not None:
            reasons.setdefault(f"{cell.row}: {cell.problem}", []).append(cell.column)
    if reasons:
        lines += ["", "Not run:", ""]
        lines += [f"- {reason} ({', '.join(columns)})" for reason, columns in reasons.items()]
    return "\n".join(lines) + "\n"


def number(value: float | None, form: str) -> str:
    """A published number in a format; a dash where none was published."""
    return "-" if value is None else format(value, form)


def listing(cells: Sequence[Cell]) -> str:
    """Every row with its recipe, the paper's numbers, and whether it can run here."""
    lines = []
    for row in dict.fromkeys(c.row for c in cells):
        mine = [c for c in cells if c.row == row]
        for recipe in dict.fromkeys(c.recipe for c in mine):
            part = [c for c in mine if c.recipe == recipe]
            states = list(dict.fromkeys(c.problem or "can run" for c in part))
            numbers = ", ".join(f"{c.column}: {number(c.paper, 'g')}" for c in part)
            lines.append(f"{row:22} {recipe:44} {'; '.join(states)}\n{'':22} paper: {numbers}")
    return "\n".join(lines)


def write_files(out: Path, table: str, text: str, cells: Sequence[Cell]) -> None:
    """TABLE.md, TABLE.csv and TABLE.json."""
    rows = [cell.as_row() for cell in cells]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / f"{table}.md", text.encode())
    write_atomically(out / f"{table}.csv", buffer.getvalue().encode())
    write_json(out / f"{table}.json", rows)
