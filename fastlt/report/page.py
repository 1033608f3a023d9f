"""The report as one HTML file that needs nothing beside it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from fastlt.report.blocks import FigureBlock, Section
from fastlt.report.style import for_page, to_svg
from fastlt.version import __version__

SHOWN = 15  # rows of a table before more are asked for
PIXELS_AN_INCH = 90  # of a figure that is too wide to be fitted into a column


def render(sections: Sequence[Section], title: str, subtitle: str) -> str:
    """The page; for use inside `in_style`."""
    figures = [block for section in sections for block in section.blocks if isinstance(block, FigureBlock)]
    svgs = {
        f.name: Markup(for_page(to_svg(f.figure), f"figure-{number}", str(escape(f.description))))
        for number, f in enumerate(figures)
    }
    # Every text is escaped; what is Markup comes from the package itself or from matplotlib, which escapes text.
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.from_string(_part("page.html")).render(
        sections=sections,
        title=title,
        subtitle=subtitle,
        svgs=svgs,
        widths={f.name: round(f.figure.get_figwidth() * PIXELS_AN_INCH) for f in figures},
        shown=SHOWN,
        style=Markup(_part("page.css")),
        script=Markup(_part("page.js")),
        footer=f"Made by fastlt {__version__} on {time.strftime('%Y-%m-%d %H:%M')}.",
    )


def _part(name: str) -> str:
    """A file of this package."""
    return (files("fastlt.report") / name).read_text(encoding="utf-8")
