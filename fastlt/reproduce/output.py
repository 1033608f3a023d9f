"""The table as Markdown, CSV and JSON, its place in a document, and the listing of what can run."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastlt.markdown_table import markdown_table
from fastlt.reproduce.tables import SCALES, Cell
from fastlt.run.atomic_file import write_atomically, write_json

END = "<!-- end of the table -->"


def markdown(title: str, cells: Sequence[Cell], scale: str) -> str:
    """The table as a page: a line a cell, then what was not run and why."""
    lines = [f"# {title}", "", f"{SCALES[scale].capitalize()}. {_legend(cells)}", "", table(cells)]
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        reason = cell.why_not()
        if reason is not None:
            reasons.setdefault(f"{cell.row}: {reason}", []).append(cell.column)
    if reasons:
        lines += ["", "Not run:", ""]
        lines += [f"- {reason} ({', '.join(columns)})" for reason, columns in reasons.items()]
    return "\n".join(lines) + "\n"


def _legend(cells: Sequence[Cell]) -> str:
    text = (
        "In %, mean ± sample standard deviation over seeds; an empty cell has not been run, or nobody has published it."
    )
    if any(cell.reference is not None for cell in cells):
        text += " The paired difference is taken seed by seed, with its 95 % interval."
    devices = _devices(cells)
    return f"{text} Trained on {', '.join(devices)}." if devices else text


def _devices(cells: Sequence[Cell]) -> list[str]:
    return sorted({row["device"] for row in (cell.as_row() for cell in cells) if row["device"] is not None})


def table(cells: Sequence[Cell]) -> str:
    """The table, an empty field where there is no number; without columns that no cell has."""
    rows = [cell.as_row() for cell in cells]
    columns = {
        "row": [row["row"] for row in rows],
        "column": [row["column"] for row in rows],
        "published": [number(row["paper"]) for row in rows],
        "ours": [_ours(row) for row in rows],
        "difference": [number(row["difference"], "+.2f") for row in rows],
        "paired difference": [_paired(row) for row in rows],
        "seeds": [str(row["seeds"] or "") for row in rows],
        **{name: [number(row[name.lower()]) for row in rows] for name in ("many", "medium", "few", "ECE")},
        "class weights": [_weights(row) for row in rows],
        "model": [row["select"] or "" for row in rows],
        "time, s": [number(row["wall_s"], ".0f") for row in rows],
        "hardware": [row["device"] or "" for row in rows],
    }
    if all(row["paper"] is None for row in rows):
        del columns["published"], columns["difference"]
    if all(row["reference"] is None for row in rows):
        del columns["paired difference"]
    if not any(columns["class weights"]):
        del columns["class weights"]
    if len(_devices(cells)) < 2:  # the legend names one
        del columns["hardware"]
    return markdown_table(list(columns), zip(*columns.values(), strict=True))


def _ours(row: Mapping[str, Any]) -> str:
    ours = number(row["ours"])
    if row["std"] is not None:
        ours += f" ± {row['std']:.2f}"
    other = row["ours_by_recipe_shots"]
    if other is not None and abs(other - row["ours"]) >= 0.005:
        ours += f" ({other:.2f} by the recipe's groups)"
    return ours


def _paired(row: Mapping[str, Any]) -> str:
    if row["paired"] is None:
        return ""
    return f"{row['paired']:+.2f} ± {row['paired_95']:.2f} to {row['reference']}"


def _weights(row: Mapping[str, Any]) -> str:
    return "" if row["least_weight"] is None else f"{row['least_weight']:.2f} to {row['largest_weight']:.2f}"


def number(value: float | None, form: str = ".2f") -> str:
    """A number in a format; nothing where there is none."""
    return "" if value is None else format(value, form)


def listing(cells: Sequence[Cell]) -> str:
    """Every row with its recipe, the paper's numbers, how many seeds it is to have, and whether it can run here."""
    lines, width = [], max(len(cell.row) for cell in cells)
    for row in dict.fromkeys(c.row for c in cells):
        mine = [c for c in cells if c.row == row]
        for recipe in dict.fromkeys(c.recipe for c in mine):
            part = [c for c in mine if c.recipe == recipe]
            states = list(dict.fromkeys(c.problem or "can run" for c in part))
            numbers = ", ".join(f"{c.column}: {number(c.paper, 'g') or '-'}{_seeds(c)}" for c in part)
            lines.append(f"{row:{width}} {recipe:44} {'; '.join(states)}\n{'':{width}} paper: {numbers}")
    return "\n".join(lines)


def _seeds(cell: Cell) -> str:
    return f" ({cell.wanted} seeds)" if cell.wanted > 1 else ""


def write_files(out: Path, name: str, text: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """NAME.md with the text, and NAME.csv and NAME.json with the rows, which all have the same keys."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / f"{name}.md", text.encode())
    write_atomically(out / f"{name}.csv", buffer.getvalue().encode())
    write_json(out / f"{name}.json", list(rows))


def place(name: str, scale: str) -> str:
    """The line of a document after which `write_into` puts a table, up to the line END."""
    return f"<!-- fastlt reproduce {name} --scale {scale} -->"


def check_place(document: Path, name: str, scale: str) -> None:
    """ValueError when a document has no place for a table."""
    _around(document, name, scale)


def write_into(document: Path, name: str, scale: str, cells: Sequence[Cell]) -> None:
    """Put the table in its place in a Markdown document, where an earlier one may stand."""
    before, after = _around(document, name, scale)
    middle = "\n".join([place(name, scale), "", _legend(cells), "", table(cells), "", END])
    write_atomically(document, (before + middle + after).encode())


def _around(document: Path, name: str, scale: str) -> tuple[str, str]:
    """What stands before the place of a table, and after it."""
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--into {document}: cannot be read ({error.strerror})") from None
    before, begin, rest = text.partition(place(name, scale))
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"--into {document}: has no place for the table; put these two lines where it is to stand:\n"
            f"{place(name, scale)}\n{END}"
        )
    return before, after
