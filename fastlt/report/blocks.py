"""What a report is made of: sections with texts, figures, tables and pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

# None is a dash. Two numbers are a mean and a standard deviation, NaN where it has none.
Cell = str | int | float | None | tuple[float, float]


@dataclass(frozen=True)
class Column:
    """digits: after the point, of numbers; None for text."""

    title: str
    digits: int | None = None

    @property
    def numeric(self) -> bool:
        return self.digits is not None

    def text(self, cell: Cell) -> str:
        """A cell as it is shown. A number comes first, so that rows can be sorted by it."""
        if isinstance(cell, tuple):
            mean, deviation = cell
            return self.text(mean) if deviation != deviation else f"{self.text(mean)} ± {self.text(deviation)}"
        if cell is None or cell != cell:
            return "-"
        return cell if isinstance(cell, str) else f"{cell:.{self.digits or 0}f}"


@dataclass(frozen=True)
class TableBlock:
    """name: of its file. search: whether a field filters the rows by what is typed.

    folded: whether it is shown when asked for alone. beside: whether it is narrow enough to stand beside a figure.
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    search: bool = False
    folded: bool = False
    beside: bool = False
    kind: str = field(default="table", init=False)

    @property
    def texts(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[column.text(cell) for column, cell in zip(self.columns, row, strict=True)] for row in self.rows]


@dataclass(frozen=True)
class FigureBlock:
    """name: of its files. description: what it shows, for those who cannot see it."""

    name: str
    figure: Figure
    description: str
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class TextBlock:
    """A paragraph. warning: whether it says what is missing or wrong."""

    text: str
    warning: bool = False
    kind: str = field(default="text", init=False)


@dataclass(frozen=True)
class HeadingBlock:
    """The name of the runs that the following blocks are of."""

    text: str
    kind: str = field(default="heading", init=False)


@dataclass(frozen=True)
class CodeBlock:
    """A long text that is shown when asked for."""

    title: str
    text: str
    kind: str = field(default="code", init=False)


@dataclass(frozen=True)
class Picture:
    """source: a data URL. pixelated: whether a browser enlarges its pixels. caption: lines under it."""

    source: str
    pixelated: bool
    name: str
    lines: Sequence[str]


@dataclass(frozen=True)
class PicturesBlock:
    """Small pictures side by side."""

    pictures: Sequence[Picture]
    kind: str = field(default="pictures", init=False)


Block = TableBlock | FigureBlock | TextBlock | HeadingBlock | CodeBlock | PicturesBlock


@dataclass(frozen=True)
class Section:
    """A part of the report with its place in the table of contents; `blocks` in the order in which they are shown."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return slug(self.title)


def slug(text: str) -> str:
    """A text as the name of a file or an anchor: lower-case letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"
