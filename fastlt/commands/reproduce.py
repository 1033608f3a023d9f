"""Run the rows of the paper's result tables and put our numbers beside the paper's.

    fastlt reproduce table8 --list                       # every row, its recipe, whether it can run here
    fastlt reproduce table8 --data DIR --seeds 3         # run or resume what is missing, then the table
    fastlt reproduce table8 --scale short --rows Ours cRT --columns 100

Each cell's run is `fastlt/train.py RECIPE overrides... seed=S` in a process of its own; a finished run is not run
again, an interrupted one goes on. Stages that several rows have in common are trained once: all stages of a run but
the last are a run of their own, and the whole run goes on from its end, as if it had been stopped there. A cell of
several runs ends with `fastlt ensemble` on them. All runs of one seed come before those of the next. TABLE.md, .csv
and .json are written to --out. The published numbers, and which recipe belongs to which row, are in
fastlt/reproduce/paper_tables.yaml.
`frozen` trains heads on frozen features instead, with options of its own: `fastlt reproduce frozen --help`.
`--data` names folders with CIFAR's files or converted data sets.
Exit code: 0 done, 1 when a run failed, 2 for a mistake on the command line, 130 when stopped.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from fastlt.arguments import make_parser, path
from fastlt.commands import reproduce_frozen
from fastlt.reproduce.availability import resolve
from fastlt.reproduce.execution import run_cells, say_what_is_missing
from fastlt.reproduce.output import listing, markdown, write_files
from fastlt.reproduce.tables import chosen, load_table, table_names

NAME = "fastlt reproduce"
FROZEN = "frozen"


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    if words[:1] == [FROZEN]:
        return reproduce_frozen.main(words[1:], f"{prog} {FROZEN}")
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("table", help=f"one of {', '.join([*table_names(), FROZEN])}")
    parser.add_argument("--list", action="store_true", help="say what could run, and run nothing")
    parser.add_argument("--data", nargs="+", type=path, default=[], metavar="DIR", help="folders to look for data in")
    parser.add_argument("--scale", choices=("short", "paper"), default="paper", help="short: one small budget for all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--columns", nargs="+", help="only these columns")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--runs", type=path, default=Path("runs/reproduce"), help="where the runs are kept")
    parser.add_argument("--out", type=path, default=Path("runs/reproduce"), help="where the tables are written")
    given = parser.parse_args(words)
    if given.seeds < 1:
        raise ValueError(f"--seeds is {given.seeds}: give at least 1")
    title, cells = load_table(given.table)
    cells = chosen(cells, given.rows, given.columns)
    for cell in cells:
        resolve(cell, [d.resolve() for d in given.data], given.scale, given.set)
    if given.list:
        print(listing(cells))
        return 0
    code = 0
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = 1 if run_cells(cells, given.runs.resolve(), given.seeds) else 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        code = 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    say_what_is_missing(cells, given.seeds)
    text = markdown(title, cells, given.scale, given.seeds)
    print(text)
    if cells:
        write_files(given.out, given.table, text, cells)
    return code
