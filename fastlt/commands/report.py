"""Compare runs: a table in the terminal, or a page with figures that opens without a network.

    fastlt report runs/ce-* runs/ours-*                      # a table of finished runs
    fastlt report runs/ce-* runs/ours-* --out report.html    # a page, with unfinished runs as far as they are
    fastlt report runs/ours-* --out report.html --files      # and its figures and numbers in report_files/
    fastlt report runs/ours-0 --weights                      # weights at every validation, as text
    fastlt report runs/ours-0 --plot weights.png             # the same as a picture

Runs whose recipes differ in nothing but name and seed are one row: mean ± sample standard deviation. A run that cannot
be read is named and left out.
Exit code: 0 done, 2 when a run could not be read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastlt.arguments import make_parser, path

if TYPE_CHECKING:
    from fastlt.report.runs import Run

NAME = "fastlt report"


def main(words: list[str], prog: str = NAME) -> int:
    """Print or write what was asked for; ValueError for a folder that holds no such thing."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=path, metavar="FILE.html", help="write a page")
    parser.add_argument(
        "--files", action="store_true", help="with --out: figures as SVG and PNG and numbers as CSV, in FILE_files/"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="make the predictions of finished runs that keep none, from the tested model and the data",
    )
    parser.add_argument("--weights", action="store_true", help="print the class weights at every validation")
    parser.add_argument(
        "--plot", type=path, metavar="FILE.png", help="draw the class weights of one run, as PNG or SVG"
    )
    arguments = parser.parse_args(words)
    if arguments.files and arguments.out is None:
        raise ValueError("--files stands beside a page: add --out FILE.html")

    alone = [name for name in ("plot", "weights") if getattr(arguments, name)]
    given = [f"--{name}" for name in (*alone, "out", "measure") if getattr(arguments, name)]
    if alone and len(given) > 1:
        raise ValueError(f"{given[0]} is a task of its own: leave out {' and '.join(given[1:])}")

    if arguments.plot is not None:
        plot(arguments)
        return 0
    if arguments.weights:
        from fastlt.report.terminal import weight_text

        for folder in arguments.runs:
            print(f"{folder}\n{weight_text(folder)}")
        return 0

    from fastlt.report.runs import open_finished, open_for_page

    open_one = open_finished if arguments.out is None else open_for_page
    runs, others = [], []
    for folder in dict.fromkeys(arguments.runs):
        try:
            runs.append(open_one(folder))
        except ValueError as error:
            others.append(error)
    if arguments.measure:
        others += measure_missing(runs)
        runs = [open_one(run.folder) for run in runs]
    for error in others:
        print(f"{prog}: error: {error}", file=sys.stderr)
    if arguments.out is not None:
        from fastlt.report.report import write_report

        told = [" ".join(str(error).split()) for error in others]
        for written in write_report(runs, told, arguments.out, files=arguments.files):
            print(written)
    elif runs and not arguments.measure:
        from fastlt.report.seeds import group_runs
        from fastlt.report.terminal import table

        print(table(group_runs(runs)))
    return 2 if others else 0


def measure_missing(runs: Sequence[Run]) -> list[ValueError]:
    """Make the predictions of finished runs that keep none, and say so; returns why that of others cannot be done."""
    from fastlt.report.measure import measure

    failed = []
    for run in runs:
        try:
            if run.result is not None:
                print(measure(run))
        except ValueError as error:
            failed.append(error)
    return failed


def plot(arguments: argparse.Namespace) -> None:
    """Draw the class weights of the one run that was given."""
    from fastlt.report.figures import weights_of_run
    from fastlt.report.runs import open_run
    from fastlt.report.style import WRITERS, in_style
    from fastlt.run.atomic_file import write_atomically

    write = WRITERS.get(arguments.plot.suffix.lower())
    if write is None:
        raise ValueError(f"--plot {arguments.plot}: give a name that ends in {' or '.join(WRITERS)}")
    if len(arguments.runs) != 1:
        raise ValueError(f"--plot draws one run, {len(arguments.runs)} were given")
    with in_style():
        write_atomically(arguments.plot, write(weights_of_run(open_run(arguments.runs[0]))))
    print(arguments.plot)
