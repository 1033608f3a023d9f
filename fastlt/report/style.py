"""How figures look, on the page in light and dark and as files of their own."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

# The colours of a figure by their name on the page, where style.css gives each a value for light and for dark. No two
# are equal: an SVG is searched for them.
COLOURS = {
    "ink": "#1f2328",
    "muted": "#59636e",
    "grid": "#dde1e6",
    "surface": "#fefefe",
    "series-1": "#2a6fd6",
    "series-2": "#d9601a",
    "series-3": "#12926a",
    "series-4": "#b07d00",
    "series-5": "#c2418a",
    "series-6": "#6a4fc9",
    "series-7": "#c93a3a",
    "series-8": "#0b8394",
}
INK, MUTED, GRID, SURFACE = (COLOURS[name] for name in ("ink", "muted", "grid", "surface"))
SERIES = [value for name, value in COLOURS.items() if name.startswith("series")]
ON_COLOUR = "#ffffff"  # words on HEAT at its fullest, in light and dark
# Many-, medium- and few-shot classes, wherever they are told apart.
SHOTS = {"many": COLOURS["series-1"], "medium": COLOURS["series-3"], "few": COLOURS["series-2"]}
# From nothing to full colour: what lies behind it, light or dark, shows through.
HEAT = LinearSegmentedColormap.from_list("heat", [(*to_rgb("#2a6fd6"), alpha) for alpha in (0.0, 1.0)])

WIDTH = 5.2  # inches: at 72 units an inch, as wide as a phone's screen
HEIGHT = 3.3
TEXT = 9  # points, the size of labels on a phone
DASHES = ("-", "--", "-.", ":")
SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": TEXT,
    "axes.titlesize": TEXT + 1,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": TEXT,
    "xtick.labelsize": TEXT,
    "ytick.labelsize": TEXT,
    "legend.fontsize": TEXT,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.facecolor": "none",
    "figure.facecolor": SURFACE,
    "savefig.facecolor": SURFACE,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",  # text stays text: it can be searched and read aloud, and takes the page's colour
    "svg.hashsalt": "fastlt",
}


def in_style() -> AbstractContextManager[None]:
    """Inside, figures are made and written as SETTINGS say."""
    return matplotlib.rc_context(SETTINGS)


def new_figure(title: str, width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Axes]:
    """A figure with one plot. width, height: in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def colour_of(number: int) -> str:
    """The colour of a series; colours come again after eight."""
    return SERIES[number % len(SERIES)]


def dashes_of(number: int) -> str:
    """The line of a series, other than those of the same colour."""
    return DASHES[number // len(SERIES) % len(DASHES)]


def shortened(name: str, length: int = 22) -> str:
    """A name that fits beside a plot: its beginning and its end, where names differ. `$` begins no formula."""
    if len(name) > length:
        tail = length * 2 // 5
        name = f"{name[: length - 1 - tail].rstrip()}…{name[-tail:].lstrip()}"
    return name.replace("$", r"\$")


def spaced(positions: Sequence[float], gap: float) -> list[float]:
    """Positions at least `gap` apart, in the same order and near the given ones."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(200):
        moved = False
        for i in range(1, len(placed)):
            missing = gap - (placed[i] - placed[i - 1])
            if missing > 1e-9 * gap:
                placed[i - 1] -= missing / 2
                placed[i] += missing / 2
                moved = True
        if not moved:
            break
    result = [0.0] * len(positions)
    for i, where in zip(order, placed, strict=True):
        result[i] = where
    return result


def to_svg(figure: Figure) -> str:
    """The figure as an SVG document in its light colours."""
    file = io.StringIO()
    with warnings.catch_warnings():  # text stays text: who shows it has the letters that our font has not
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file, 220 dots an inch."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=220)
    return file.getvalue()


# How a figure is written, by the ending of the file's name.
WRITERS = {".png": to_png, ".svg": lambda figure: to_svg(figure).encode()}


def for_page(svg: str, name: str, description: str) -> str:
    """An SVG document as a part of a page: in the page's colours and font, with no names but its own.

    description: for those who cannot see it.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{description}"', 1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'xlink:href="#{name}-')
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    svg = re.sub(r"(\d+px) [^;\"]*DejaVu Sans[^;\"]*", r"\1 var(--font)", svg)
    return svg
