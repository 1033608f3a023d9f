"""The figures and numbers of a report as files: SVG and PNG, and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastlt.report.blocks import Cell, Column, FigureBlock, Section, TableBlock
from fastlt.report.style import to_png, to_svg
from fastlt.run.atomic_file import write_atomically


def write_files(folder: Path, sections: Sequence[Section], numbers_alone: Sequence[TableBlock]) -> list[Path]:
    """Write NAME.svg and NAME.png of every figure and NAME.csv of every table; returns their paths. RunFileError.

    For use inside `in_style`.
    """
    written = []
    for name, content in _contents(sections, numbers_alone):
        write_atomically(folder / name, content)
        written.append(folder / name)
    return written


def _contents(sections: Sequence[Section], numbers_alone: Sequence[TableBlock]) -> Iterator[tuple[str, bytes]]:
    blocks = [block for section in sections for block in section.blocks]
    for block in [*blocks, *numbers_alone]:
        if isinstance(block, FigureBlock):
            yield f"{block.name}.svg", to_svg(block.figure).encode()
            yield f"{block.name}.png", to_png(block.figure)
        elif isinstance(block, TableBlock):
            yield f"{block.name}.csv", to_csv(block).encode()


def to_csv(table: TableBlock) -> str:
    """The rows with all digits. A mean has its standard deviation in a column of its own; the unknown is empty."""
    means = [any(isinstance(row[i], tuple) for row in table.rows) for i in range(len(table.columns))]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([title for i, column in enumerate(table.columns) for title in _titles(column, means[i])])
    for row in table.rows:
        writer.writerow([value for cell, mean in zip(row, means, strict=True) for value in _values(cell, mean)])
    return file.getvalue()


def _titles(column: Column, mean: bool) -> list[str]:
    return [column.title, f"{column.title} sd"] if mean else [column.title]


def _values(cell: Cell, mean: bool) -> list[Cell]:
    parts = list(cell) if isinstance(cell, tuple) else [cell, None] if mean else [cell]
    return ["" if part is None or part != part else part for part in parts]
