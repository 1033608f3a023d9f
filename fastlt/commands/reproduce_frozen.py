"""Train every method that can train a head on the features of a frozen, pretrained backbone, and compare them.

    fastlt reproduce frozen --data DIR                                  # CIFAR-10-LT, EfficientNet-Lite0
    fastlt reproduce frozen --data DIR --weights FILE --seeds 3         # its weights from a file
    fastlt reproduce frozen --recipe mine.yaml --rows Cross-entropy "Balanced softmax"
    fastlt reproduce frozen --list

Features are computed once, below --out/.features; a run then takes seconds, and --jobs of them run at once. Runs that
are done are not run again: the same command goes on, also with other --jobs. These share out the threads, by which the
last bits of sums may differ. frozen.md, .csv and .json are written to --out, and those of --ablation as
frozen_ablation. Each method is shown at its own best rate of --lr by validation, and at the common rate. The first
--rate-seeds are trained at every rate and choose the best; further seeds are trained at these two alone. Images of the
validation set are the meta set too: methods that learn weights on it see it while they train.
Exit code: 0 done, 1 when a process of the runs ended, 2 for a mistake on the command line, 130 when stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fastlt.arguments import make_parser, path, positive
from fastlt.recipe import Recipe, load_recipe
from fastlt.reproduce.availability import CIFAR_FILES, find_data
from fastlt.reproduce.frozen import STAGE, Method, base_recipe, open_context, plan, read_methods
from fastlt.reproduce.frozen_pool import Task, make_tasks, run_tasks
from fastlt.reproduce.frozen_tables import as_record, best_rate, markdown, rows
from fastlt.reproduce.output import write_files
from fastlt.run.fit import process_as_before
from fastlt.run.loading import iterations_per_epoch
from loaders.cores import available_cores

NAME = "fastlt reproduce frozen"
RATES = (0.001, 0.005, 0.02, 0.05)
FACTORS = (10.0, 50.0, 100.0, 200.0)
WRITE_EVERY_S = 30.0


def main(words: list[str], prog: str = NAME) -> int:
    """Run the command line `words`; returns the exit code."""
    parser = make_parser(__doc__, NAME, prog)
    parser.add_argument("--list", action="store_true", help="name the rows, and run nothing")
    parser.add_argument(
        "--recipe", default=str(base_recipe()), help="a recipe with data.cached_views (default: CIFAR-10-LT)"
    )
    parser.add_argument("--data", nargs="+", type=path, default=[], metavar="DIR", help="folders to look for data in")
    parser.add_argument("--backbone", metavar="NAME", help="a network of timm (default: the recipe's)")
    parser.add_argument("--weights", type=path, metavar="FILE", help="its weights (default: those that timm fetches)")
    parser.add_argument("--imbalance", nargs="+", type=float, metavar="F", help="of CIFAR (default: 10 50 100 200)")
    parser.add_argument("--lr", nargs="+", type=float, default=list(RATES), help="rates (default: 0.001 to 0.05)")
    parser.add_argument(
        "--common-lr", type=float, metavar="LR", help="one of --lr (default: the recipe's, or the middle)"
    )
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="seeds 0 to N-1 (default: 3)")
    parser.add_argument(
        "--rate-seeds", type=positive, default=2, metavar="N", help="seeds that choose the best rate (default: 2)"
    )
    parser.add_argument("--ablation", action="store_true", help="the parts of Difficulty-Net in place of the methods")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--jobs", type=positive, default=available_cores(), help="runs at once (default: a core each)")
    parser.add_argument(
        "--out", type=path, default=Path("runs/frozen"), help="where features, results and tables are kept"
    )
    given = parser.parse_args(words)
    methods = read_methods(given.rows, "ablation" if given.ablation else "rows")
    if given.list:
        print("\n".join(method.name for method in methods))
        return 0
    shared = [*_model_words(given), f"runs={given.out.resolve()}", "name=frozen", *given.set]
    recipe = load_recipe(given.recipe, shared)
    common = _common_rate(given.common_lr, sorted(set(given.lr)), recipe)
    is_cifar = recipe.data.source in CIFAR_FILES
    if given.imbalance and not is_cifar:
        raise ValueError(f"--imbalance is for CIFAR, and {recipe.name} has source {recipe.data.source!r}; leave it out")
    factors = (given.imbalance or FACTORS) if is_cifar else (None,)
    named = {f"{recipe.data.source}, imbalance {f:g}" if f else recipe.name: f for f in factors}
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    table = _Table(given.out, "frozen_ablation" if given.ablation else "frozen", methods, common, given.rate_seeds)
    try:
        for data, factor in named.items():
            cut = [] if factor is None else [f"data.imbalance_factor={factor:g}"]
            tasks = _tasks(given, methods, [*shared, *cut])
            table.tasks[data] = tasks
            _run(data, [t for t in tasks if t.run.seed < given.rate_seeds], given.jobs, table)
            kept = table.rates(data)
            further = [t for t in tasks if t.run.seed >= given.rate_seeds and (t.run.method, t.run.lr) in kept]
            _run(f"{data}, further seeds", further, given.jobs, table)
            table.write()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
        table.write()
    print(table.text)
    return 0


def _model_words(given: argparse.Namespace) -> list[str]:
    words = [] if given.backbone is None else [f"model.name={given.backbone}"]
    if given.weights is not None:
        words += ["model.pretrained=false", f"model.checkpoint={given.weights.resolve()}"]
    return words


def _common_rate(asked: float | None, rates: Sequence[float], recipe: Recipe) -> float:
    """The rate that is common to all methods."""
    if asked is None:
        return recipe.stages[STAGE].lr if recipe.stages[STAGE].lr in rates else rates[len(rates) // 2]
    if asked not in rates:
        raise ValueError(f"--common-lr is {asked:g}: give one of --lr, {', '.join(f'{r:g}' for r in rates)}")
    return asked


def _tasks(given: argparse.Namespace, methods: Sequence[Method], words: list[str]) -> list[Task]:
    """The runs of a data set, whose features are computed first, with all cores."""
    recipe = load_recipe(given.recipe, words)
    found = find_data(recipe, [folder.resolve() for folder in given.data])
    if found is None:
        where = ", ".join(map(str, given.data)) or "data/"
        raise ValueError(f"data not found: {recipe.data.source} in {where}; name their folder: --data DIR")
    words = [*words, *found]
    with process_as_before():
        context = open_context(load_recipe(given.recipe, words))
    runs = plan(
        recipe, methods, sorted(set(given.lr)), given.seeds, iterations_per_epoch(context, recipe.stages[STAGE])
    )
    threads = max(1, available_cores() // given.jobs)
    return make_tasks(Path(given.recipe), words, runs, context, given.out / "results", threads)


def _run(what: str, tasks: Sequence[Task], jobs: int, table: _Table) -> None:
    if tasks:
        with tqdm(desc=what, total=len(tasks), initial=sum(t.file.is_file() for t in tasks), unit="run") as bar:
            run_tasks(tasks, jobs, lambda _: table.update(bar))


class _Table:
    """The files of the table, rewritten now and then while runs end.

    out, name: the folder, and the names of the files in it without the ending. rate_seeds: as `rows` takes it.
    tasks: by data set, those that have been planned.
    """

    def __init__(self, out: Path, name: str, methods: Sequence[Method], common: float, rate_seeds: int) -> None:
        self.out, self.name, self.methods, self.common, self.rate_seeds = out, name, methods, common, rate_seeds
        self.tasks: dict[str, list[Task]] = {}
        self.text = ""
        self.written = 0.0

    def update(self, bar: tqdm) -> None:
        """A run is over."""
        bar.update()
        if time.monotonic() - self.written > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """NAME.md, .csv and .json of all results that are there."""
        self.written = time.monotonic()
        records = []
        for data in self.tasks:
            table = rows(self.methods, self._results(data), self.common, self.rate_seeds)
            records += [as_record(data, row) for row in table]
        if not records:
            return
        self.text = markdown("Heads on frozen features", records, self.methods[0].name)
        write_files(self.out, self.name, self.text, records)

    def rates(self, data: str) -> set[tuple[str, float]]:
        """The rows that are trained and the rates at which the table shows them, or rows that measure their runs."""
        results = self._results(data)
        best = {(method.runs, best_rate(method, results, self.rate_seeds)) for method in self.methods}
        return {(name, lr) for name, lr in best if lr is not None} | {(m.runs, self.common) for m in self.methods}

    def _results(self, data: str) -> dict[tuple[str, float, int], dict[str, Any]]:
        found = ((task.run, task.result()) for task in self.tasks[data])
        return {(run.method, run.lr, run.seed): result for run, result in found if result is not None}
