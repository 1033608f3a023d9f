"""From run folders to the files of a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastlt.report.figures import make_series
from fastlt.report.files import write_files
from fastlt.report.page import render
from fastlt.report.runs import Run
from fastlt.report.sections import all_sections, numbers_alone
from fastlt.report.seeds import group_runs
from fastlt.report.style import in_style
from fastlt.run.atomic_file import write_atomically


def write_report(runs: Sequence[Run], unreadable: Sequence[str], out: Path, *, files: bool = False) -> list[Path]:
    """Write the page, and with `files` its figures and numbers into the folder beside it; returns what was written.

    runs: of `open_for_page`. unreadable: why other folders are not shown, for the page. ValueError when there is no
    run, RunFileError when a file cannot be written.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is {out}: give a name that ends in .html")
    if not runs:
        raise ValueError("there is no run to report on; give folders below runs/")
    warnings = list(unreadable)
    series = make_series(group_runs(list(runs), say=warnings.append))
    with in_style():
        sections = all_sections(series, warnings)
        names = [one.name for one in series]
        title = f"Report: {names[0]}" if len(names) == 1 else f"Report: {len(names)} recipes compared"
        finished = sum(run.result is not None for run in runs)
        subtitle = f"{finished} of {len(runs)} runs finished: {', '.join(names)}"
        write_atomically(out, render(sections, title, subtitle).encode())
        if not files:
            return [out]
        beside = out.with_name(f"{out.stem}_files")
        write_files(beside, sections, numbers_alone(series))
    return [out, beside]
