"""Compare finished runs: a Markdown table of means over seeds, and how the class weights moved.

    fastlt report runs/ce-* runs/ours-*                     # table
    fastlt report runs/ours-0 --weights                      # weights at every evaluation, as text
    fastlt report runs/ours-0 --plot weights.png             # the same as a picture

Runs whose recipes differ in nothing but name and seed are one row: mean ± sample standard deviation. A run that cannot
be read is named and left out.
Exit code: 0 done, 2 when a run could not be read.
"""

from __future__ import annotations

import sys

from fastlt.arguments import make_parser, path

NAME = "fastlt report"


def main(words: list[str], prog: str = NAME) -> int:
    """Print what was asked for; ValueError for a folder that holds no such thing."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("runs", nargs="+", type=path, metavar="RUN", help="run folders")
    parser.add_argument(
        "--weights", action="store_true", help="print the class weights of each run at every evaluation"
    )
    parser.add_argument("--plot", type=path, metavar="FILE.png", help="draw the class weights of one run")
    arguments = parser.parse_args(words)

    from fastlt.report import group_runs, plot_weights, read_run, table, weight_text

    if arguments.plot is not None:
        if len(arguments.runs) != 1:
            raise ValueError(f"--plot draws one run, {len(arguments.runs)} were given")
        plot_weights(arguments.runs[0], read_run(arguments.runs[0]).result["class_counts"], arguments.plot)
        print(arguments.plot)
    elif arguments.weights:
        for folder in arguments.runs:
            print(f"{folder}\n{weight_text(folder)}")
    else:
        runs, code = [], 0
        for folder in arguments.runs:
            try:
                runs.append(read_run(folder))
            except ValueError as error:
                print(f"{prog}: error: {error}", file=sys.stderr)
                code = 2
        if runs:
            print(table(group_runs(runs)))
        return code
    return 0
