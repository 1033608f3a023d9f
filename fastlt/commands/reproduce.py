"""Run the rows of the result tables of the Difficulty-Net paper, and print measured beside published numbers.

    fastlt reproduce table8 --list                       # every row, its recipe, whether it can run here
    fastlt reproduce table8 --data DIR --seeds 3         # run or resume what is missing, then the table
    fastlt reproduce cifar10_lt --scale quick --data DIR --jobs 2 --nice 10
    fastlt reproduce cifar10_lt --scale quick --data DIR --rates 0.05 0.1 0.2 0.4

Each cell's run is `fastlt/train.py RECIPE overrides... seed=S` in a process of its own; --jobs of them at once share
the cores. A finished run is not run again, an interrupted one goes on, whatever ended it. Stages that several rows have
in common are trained once: all stages of a run but the last are a run of their own, and the whole run goes on from its
end, as if it had been stopped there. A cell of several runs ends with `fastlt ensemble` on them. All runs of one seed
come before those of the next, the shortest first. A run that fails is told, and the others go on.
TABLE.md, .csv and .json are written to --out after every run, TABLE_SCALE.md and so on at another scale than paper.
They have the chosen rows and columns. TABLE_runs.json beside them holds the results of these runs, and of those that
other calls have written there. Several machines share a table by it: with --results FILE, runs whose results are in the
file are not run here. Paths of data and weights are taken to lead to the same content.
--into puts the table into a document, between the lines <!-- fastlt reproduce TABLE --scale SCALE --> and
<!-- end of the table -->. --rates compares learning rates on validation, for the row CE unless --rows names others.
The published numbers, which recipe belongs to which row, which rows and columns run when none are named, and how many
seeds each has without --seeds, are in fastlt/reproduce/paper_tables.yaml.
`frozen` trains heads on frozen features instead, with options of its own: `fastlt reproduce frozen --help`.
--data names folders with CIFAR's files or converted data sets.
Exit code: 0 done, 1 when a run failed, 2 for a mistake on the command line, 130 when stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fastlt.arguments import make_parser, path, positive, whole
from fastlt.commands import reproduce_frozen
from fastlt.reproduce.availability import resolve
from fastlt.reproduce.execution import Campaign
from fastlt.reproduce.output import check_place, listing, markdown, write_files, write_into
from fastlt.reproduce.rates import at_rates, rates_table
from fastlt.reproduce.shared_results import read_results
from fastlt.reproduce.tables import SCALES, Cell, chosen, load_table, table_names
from fastlt.run.atomic_file import write_atomically

NAME = "fastlt reproduce"
FROZEN = "frozen"
PLACE = Path("runs/reproduce")


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    if words[:1] == [FROZEN]:
        return reproduce_frozen.main(words[1:], f"{prog} {FROZEN}")
    given = _parser(prog).parse_args(words)
    title, cells = load_table(given.table)
    if given.scale == "quick" and not any(cell.scaled["quick"] for cell in cells):
        raise ValueError(f"--scale quick: {given.table} has no such budget; take short or paper")
    if given.into is not None and given.rates:
        raise ValueError("--rates: compares validation accuracies, and has no table for --into; leave one of them out")
    if given.into is not None:
        check_place(given.into, given.table, given.scale)
    cells = _chosen(cells, given)
    if not cells:
        raise ValueError(f"--rows and --columns: {given.table} has no number there; --list without them shows all")
    for cell in cells:
        cell.wanted = given.seeds or max(1, cell.seeds)
        resolve(cell, [d.resolve() for d in given.data], given.scale, given.set)
    if given.list:
        print(listing(cells))
        return 0
    reproduction = _Reproduction(cells, title, given)
    code = 0
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = reproduction.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        code = 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(reproduction.write())
    return code


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("table", help=f"one of {', '.join([*table_names(), FROZEN])}")
    parser.add_argument("--list", action="store_true", help="say what could run, and run nothing")
    parser.add_argument("--collect", action="store_true", help="run nothing; write the table of what is finished")
    parser.add_argument("--data", nargs="+", type=path, default=[], metavar="DIR", help="folders to look for data in")
    parser.add_argument(
        "--scale", choices=tuple(SCALES), default="paper", help="quick and short: one budget for all rows"
    )
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="seeds 0 to N-1; as many as the table says if not set"
    )
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--columns", nargs="+", help="only these columns")
    parser.add_argument("--jobs", type=positive, default=1, metavar="K", help="runs at once; they share the cores")
    parser.add_argument("--nice", type=whole(0, 19), default=0, metavar="N", help="run at a priority lower by so much")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="compare learning rates on validation")
    parser.add_argument("--runs", type=path, default=PLACE, help=f"where the runs are kept (default: {PLACE})")
    parser.add_argument("--out", type=path, default=PLACE, help=f"where the tables are written (default: {PLACE})")
    parser.add_argument(
        "--results", nargs="+", type=path, default=[], metavar="FILE", help="TABLE_runs.json of other machines"
    )
    parser.add_argument("--into", type=path, metavar="FILE", help="a Markdown document to put the table into")
    return parser


def _chosen(cells: list[Cell], given: argparse.Namespace) -> list[Cell]:
    if not given.rates:
        return chosen(cells, given.rows, given.columns)
    rows, columns = given.rows or ["CE"], given.columns or [cells[0].column]
    return at_rates(chosen(cells, rows, columns), given.rates, given.scale)


class _Reproduction:
    """The chosen cells of a table: their runs, and the files that tell of them."""

    def __init__(self, cells: Sequence[Cell], title: str, given: argparse.Namespace) -> None:
        self.cells, self.title, self.given = cells, title, given
        self.name = given.table if given.scale == "paper" else f"{given.table}_{given.scale}"
        self.shared = read_results(given.results)

    def run(self) -> int:
        """Collect what is there and run what is missing, the table being written after every run; the exit code."""
        given = self.given
        campaign = Campaign(
            self.cells,
            given.runs.resolve(),
            jobs=given.jobs,
            nice=given.nice,
            shared=self.shared,
            changed=self.write,
        )
        self.write()
        failed = len(campaign.failed) if given.collect else campaign.run()
        return 1 if failed else 0

    def write(self) -> str:
        """Write the table to the files that it belongs in; returns its text."""
        given = self.given
        if given.rates:
            text = rates_table(self.cells)
            write_atomically(given.out / f"{self.name}_rates.md", text.encode())
            return text
        text = markdown(self.title, self.cells, given.scale)
        write_files(given.out, self.name, text, [cell.as_row() for cell in self.cells])
        file = given.out / f"{self.name}_runs.json"
        self.shared.add_to(file)
        if given.into is not None:
            write_into(given.into, given.table, given.scale, self.cells)
        return text
