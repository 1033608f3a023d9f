"""Run the rows of the paper's result tables and put our numbers beside the paper's.

    python tools/reproduce.py table8 --list                       # every row, its recipe, whether it can run here
    python tools/reproduce.py table8 --data DIR --seeds 3         # run or resume what is missing, then the table
    python tools/reproduce.py table8 --scale short --rows Ours cRT --columns 100

Each cell's run is `fastlt/train.py RECIPE overrides... seed=S` in a process of its own; a finished run is not run
again, an interrupted one goes on. What a run of several stages has in common with other rows is trained once: all
stages but its last are a run of their own, from whose end it goes on as if it had been stopped there. A cell of
several runs ends with tools/ensemble.py on them. One seed of everything comes before the next seed. Leaves TABLE.md,
.csv and .json in --out. The published numbers, and which recipe belongs to which row, are in tools/paper_tables.yaml.
`--data` names folders with CIFAR's files or converted data sets.
Exit code: 0 done, 1 when a run failed, 2 for a mistake on the command line, 130 when stopped.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import hashlib
import io
import json
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import IO, Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fastlt.names import pick  # noqa: E402
from fastlt.recipe import Recipe, differences, is_harmless, load_recipe  # noqa: E402
from fastlt.run.checkpoint import LAST, read_json, write_atomically, write_json  # noqa: E402
from loaders.stored.dataset import ConvertedDataset  # noqa: E402

PAPER = Path(__file__).with_name("paper_tables.yaml")
CIFAR_FILES = {"cifar10": "cifar-10-", "cifar100": "cifar-100-"}

# `--scale short`: one budget for every row, so that rows can be compared with each other, not with the paper. A stage
# that starts from fresh weights is what differs; one that goes on from it gets a quarter of it. Stages that descend
# nothing (tau_norm) stay as they are. A table's or a row's own `short` words come after these.
SHORT_ITERATIONS = 400

# Keys that are left out of the digest that names a run, besides the harmless ones.
NOT_IN_NAME = ("name", "seed", "data.converted")


def short_budget(recipe: Recipe) -> list[str]:
    """The override words that cut each stage of a recipe to the short budget, under a cosine schedule."""
    words = []
    for position, (name, stage) in enumerate(recipe.stages.items()):
        if stage.method == "tau_norm":
            continue
        length = SHORT_ITERATIONS if position == 0 or stage.start == "fresh" else SHORT_ITERATIONS // 4
        settings = {
            "epochs": "null",
            "iterations": length,
            "warmup": length // 10,
            "warmup_from": 0,
            "schedule": "cosine",
            "milestones": "[]",
            "evaluate_every": length // 4,
        }
        words += [f"stages.{name}.{key}={value}" for key, value in settings.items()]
    return words


@dataclass
class Cell:
    """One number of a table and what reproduces it.

    paper: the published number, None when there is none. recipe: stem of a file of recipes/. overrides: words that make
    the recipe this cell's; short: further ones at `--scale short`. metric: key of result.json. problem: why it was not
    run, None when it can be. results: one result.json a seed, in order. members: the cells that an ensemble puts
    together; `recipe` then names all of theirs, and `overrides` holds all of theirs.
    """

    row: str
    column: str
    paper: float | None
    recipe: str
    overrides: list[str]
    metric: str
    short: list[str] = field(default_factory=list)
    problem: str | None = None
    results: list[dict[str, Any]] = field(default_factory=list)
    members: list[Cell] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return ROOT / "recipes" / f"{self.recipe}.yaml"

    def percentages(self) -> list[float]:
        """Our value under each seed that has one."""
        return [100 * r[self.metric] for r in self.results if r[self.metric] is not None]

    def as_row(self) -> dict[str, Any]:
        """What the CSV and JSON files say of the cell."""
        ours = self.percentages()
        mean = statistics.mean(ours) if ours else None
        return {
            "row": self.row,
            "column": self.column,
            "recipe": self.recipe,
            "overrides": " ".join(self.overrides),
            "paper": self.paper,
            "ours": mean,
            "std": statistics.stdev(ours) if len(ours) > 1 else None,
            "seeds": len(ours),
            "difference": None if mean is None or self.paper is None else mean - self.paper,
            "train_s": statistics.mean(r["train_s"] for r in self.results) if self.results else None,
            "device": " + ".join(sorted({r["device"] for r in self.results})) or None,
            "runs": " ".join(r["name"] for r in self.results),
            "not_run": self.problem,
        }


def table_names(tables: Path = PAPER) -> list[str]:
    """What can be reproduced."""
    return list(yaml.safe_load(tables.read_text(encoding="utf-8")))


def load_table(name: str, tables: Path = PAPER) -> tuple[str, list[Cell]]:
    """Title and cells of a table, row by row; a cell without a number is left out unless the table says `run_all`."""
    table = pick("table", name, yaml.safe_load(tables.read_text(encoding="utf-8")))
    cells = []
    for row in table["rows"]:
        values = row.get("values", [None] * len(table["columns"]))
        for column, value in zip(table["columns"], values, strict=True):
            if value is None and not table.get("run_all", False):
                continue
            overrides = [
                *table.get("overrides", []),
                *column.get("overrides", []),
                *row.get("overrides", []),
                *row.get("by_column", {}).get(column["name"], []),
            ]
            recipes = row.get("ensemble") or [row.get("recipe") or column["recipe"]]
            place = (row["name"], column["name"], value)
            rest = (overrides, column.get("metric", "top1"), [*table.get("short", []), *row.get("short", [])])
            members = [Cell(*place, recipe, *rest) for recipe in recipes]
            cells.append(members[0] if len(members) == 1 else Cell(*place, "+".join(recipes), *rest, members=members))
    return table["title"], cells


def chosen(cells: list[Cell], rows: Sequence[str] | None, columns: Sequence[str] | None) -> list[Cell]:
    """The cells of these rows and columns, all when None; ValueError for a name that the table does not have."""
    for kind, names, known in (("row", rows, {c.row for c in cells}), ("column", columns, {c.column for c in cells})):
        for name in names or []:
            pick(kind, name, dict.fromkeys(known))
    return [c for c in cells if (not rows or c.row in rows) and (not columns or c.column in columns)]


# Whether a cell can run here


def resolve(cell: Cell, data: Sequence[Path], scale: str, extra: Sequence[str]) -> None:
    """Complete the overrides with budget, `extra` and where the data are, or say in `problem` why it cannot run."""
    if cell.members:
        for member in cell.members:
            resolve(member, data, scale, extra)
        cell.overrides = list(dict.fromkeys(word for member in cell.members for word in member.overrides))
        cell.problem = next((m.problem for m in cell.members if m.problem is not None), None)
        return
    if not cell.path.is_file():
        cell.problem = f"no recipe yet: recipes/{cell.recipe}.yaml"
        return
    try:
        if scale == "short":
            cell.overrides = [
                *cell.overrides,
                *short_budget(load_recipe(cell.path, cell.overrides)),
                *cell.short,
            ]
        cell.overrides = [*cell.overrides, *extra]
        recipe = load_recipe(cell.path, cell.overrides)
    except ValueError as error:
        cell.problem = " ".join(str(error).split())
        return
    found = find_data(recipe, data)
    if found is None:
        where = ", ".join(map(str, data)) or "data/"
        cell.problem = f"data not found: {recipe.data.source}, {recipe.data.num_classes} classes, in {where}"
    else:
        cell.overrides = [*cell.overrides, *found]


def find_data(recipe: Recipe, folders: Sequence[Path]) -> list[str] | None:
    """Override words that lead to the recipe's data, [] when it finds them by itself, None when they are not here."""
    data = recipe.data
    if data.source == "digits" or (data.converted and _is_converted(Path(data.converted), data.num_classes)):
        return []
    if data.source in CIFAR_FILES:
        for folder in (*folders, Path(data.root or "data/raw")):
            if any(folder.glob(CIFAR_FILES[data.source] + "*")):
                return [f"data.root={folder}", "data.download=false"]
        return None
    for folder in folders:
        for candidate in (folder, folder / Path(data.converted or recipe.name).name):
            if _is_converted(candidate, data.num_classes):
                return [f"data.converted={candidate}"]
    return None


def _is_converted(folder: Path, num_classes: int | None) -> bool:
    """Whether the folder is a converted data set of so many classes: no two of the tables' have the same number."""
    try:
        return num_classes in (None, len(ConvertedDataset.open(folder).class_names))
    except ValueError:
        return False


# Running


@dataclass(frozen=True)
class TrainingRun:
    """One run of the trainer: a recipe file, and the override words that go after it, all but its name.

    identity: equal for runs whose results are. first: the run of all stages but the last, whose end this one goes on
    from; None for a recipe of one stage.
    """

    path: Path
    words: tuple[str, ...]
    recipe: Recipe
    identity: str
    name: str
    first: TrainingRun | None

    @property
    def folder(self) -> Path:
        return self.recipe.folder.with_name(self.name)

    @property
    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "fastlt" / "train.py"), str(self.path), *self.words, f"name={self.name}"]

    @property
    def needs(self) -> tuple[TrainingRun, ...]:
        """The runs that have to be finished before this one starts."""
        if self.first is None or (self.folder / "checkpoints" / LAST).exists():
            return ()
        return (self.first,)

    def prepare(self) -> None:
        """Make the run folder stand where the first run ended: the trainer resumes there, bit for bit."""
        if not self.needs:
            return
        part = self.folder.with_name(f"{self.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.first.folder / "checkpoints", part / "checkpoints")
        shutil.copy2(self.first.folder / "log.jsonl", part)
        if self.folder.exists():  # made by a run that was killed before its first checkpoint
            shutil.rmtree(self.folder)
        part.rename(self.folder)

    def finished(self) -> bool:
        """Whether the folder holds the result of this recipe; of another one, train.py refuses with the reason."""
        recorded = self.folder / "recipe.yaml"
        if not (self.folder / "result.json").is_file() or not recorded.is_file():
            return False
        return not differences(load_recipe(recorded), replace(self.recipe, name=self.name))


@dataclass(frozen=True)
class EnsembleRun:
    """Finished runs put together by tools/ensemble.py; it can be asked what a training run can."""

    members: tuple[TrainingRun, ...]
    identity: str
    name: str

    @property
    def folder(self) -> Path:
        return self.members[0].folder.with_name(self.name)

    @property
    def command(self) -> list[str]:
        folders = [str(member.folder) for member in self.members]
        return [sys.executable, str(ROOT / "tools" / "ensemble.py"), *folders, "--out", str(self.folder)]

    @property
    def needs(self) -> tuple[TrainingRun, ...]:
        return self.members

    def prepare(self) -> None:
        """Nothing: the members' folders are read where they are."""

    def finished(self) -> bool:
        """Whether the folder holds the ensemble of the members' results as they are now."""
        result = self.folder / "result.json"
        if not result.is_file() or not all(member.finished() for member in self.members):
            return False
        recorded = [(m["run"], m["top1"]) for m in read_json(result)["members"]]
        return recorded == [(m.name, read_json(m.folder / "result.json")["top1"]) for m in self.members]


Run = TrainingRun | EnsembleRun


def plan_run(cell: Cell, runs: Path, seed: int) -> Run:
    """The run of a cell under a seed, with those that it needs."""
    if not cell.members:
        return _plan(cell.path, [*cell.overrides, f"runs={runs}", f"seed={seed}"])
    members = tuple(plan_run(member, runs, seed) for member in cell.members)
    identity = f"{_digest([m.identity for m in members])}-{seed}"
    return EnsembleRun(members, identity, f"{cell.recipe}-{identity}")


def _plan(path: Path, words: list[str]) -> TrainingRun:
    recipe = load_recipe(path, words)
    *before, last = recipe.stages
    try:
        first = _plan(path, [*words, f"stages.{last}=null"]) if before else None
    except ValueError:
        first = None  # stages that are no recipe without the last one are trained with it
    identity = f"{result_digest(recipe)}-{recipe.seed}"
    # Rows and tables that ask for the same training share it, whatever recipe file it was first asked for by.
    there = sorted(Path(recipe.runs).glob(f"*-{identity}"))
    name = there[0].name if there else f"{path.stem}-{identity}"
    return TrainingRun(path, tuple(words), recipe, identity, name, first)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


def result_digest(recipe: Recipe) -> str:
    """Eight digits that are equal for recipes whose results are, under the same seed and on the same data."""
    tree = not_default(recipe)
    for key in NOT_IN_NAME:
        section, _, last = key.rpartition(".")
        (tree[section] if section else tree).pop(last, None)
    return _digest(tree)


def not_default(value: Any) -> Any:
    """A recipe's keys that can change a result and differ from their defaults.

    A key that a later version adds leaves older runs their name.
    """
    if isinstance(value, dict):
        return {key: not_default(v) for key, v in value.items()}
    if not is_dataclass(value):
        return value
    told = {}
    for key in fields(value):
        if is_harmless(key):
            continue
        default = key.default if key.default_factory is MISSING else key.default_factory()
        own = getattr(value, key.name)
        if own == default:
            continue
        own = not_default(own)
        # The options of a method that are all left at their defaults are as good as not given.
        if own != {}:
            told[key.name] = own
    return told


def run_cells(cells: Sequence[Cell], runs: Path, seeds: int) -> int:
    """Run what is missing, one seed of every cell before the next; fills in the cells, returns how many runs failed."""
    runs.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for seed in range(seeds):
        for cell in cells:
            if cell.problem is not None and cell.problem not in failed.values():
                continue
            run = plan_run(cell, runs, seed)
            if run.identity not in failed:
                try:
                    problem = complete(run, f"{cell.row}, {cell.column}, seed {seed}", failed)
                    if problem is None:
                        cell.results.append(read_json(run.folder / "result.json"))
                        continue
                except ValueError as error:  # a damaged file of an earlier run, or a recipe of another version
                    problem = " ".join(str(error).split())
                failed[run.identity] = problem
            cell.problem = failed[run.identity]
    return len(failed)


def complete(run: Run, label: str, failed: dict[str, str]) -> str | None:
    """Run what is missing of a run, and first of those it needs. Returns why it failed, None when it is done.

    Raises KeyboardInterrupt when a run was stopped. failed: reasons of runs that are not tried again, added to.
    """
    log = run.folder.with_name(f"{run.name}.log")
    with log.open("a", encoding="utf-8") as output:
        # The trainer inherits the lock with its output: a run that outlived its reproduce.py is waited for.
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for {run.name}, which another process trains", file=sys.stderr, flush=True)
            fcntl.flock(output, fcntl.LOCK_EX)
        if run.finished():
            return None
        for need in run.needs:
            if need.identity not in failed:
                problem = complete(need, f"{label}, for {run.name}", failed)
                if problem is not None:
                    failed[need.identity] = problem
            if need.identity in failed:
                return failed[need.identity]
        run.prepare()
        print(f"running {run.name}: {label}", file=sys.stderr, flush=True)
        code = train(run.command, output)
    if code in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if code != 0:
        lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
        return f"failed with code {code}: {lines[-1] if lines else 'no output'} (see {log})"
    return None


def train(words: list[str], output: IO[str]) -> int:
    """Run the trainer, output into a file; returns its exit code. When stopped, lets it save a checkpoint first."""
    # In a session of its own, so that Ctrl-C reaches it once, through us.
    process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


# Telling


def markdown(title: str, cells: Sequence[Cell], scale: str, seeds: int) -> str:
    """The table as Markdown: a line a cell that was run, then what was not run and why."""
    budget = "the recipes' full length" if scale == "paper" else "one short budget for all"
    devices = sorted({r["device"] for c in cells for r in c.results})
    lines = [f"# {title}", "", f"In %, mean ± sample standard deviation over at most {seeds} seeds; {budget}.", ""]
    lines[2] += f" Trained on {', '.join(devices)}." if devices else ""
    lines += ["| row | column | paper | ours | seeds | difference | training, s |", "|---|---|---|---|---|---|---|"]
    for cell in cells:
        row = cell.as_row()
        if row["ours"] is None:
            continue
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        difference = "-" if row["difference"] is None else f"{row['difference']:+.2f}"
        lines.append(
            f"| {cell.row} | {cell.column} | {number(cell.paper, '.2f')} | {row['ours']:.2f}{spread} | {row['seeds']} "
            f"| {difference} | {row['train_s']:.0f} |"
        )
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if cell.problem is not None:
            reasons.setdefault(f"{cell.row}: {cell.problem}", []).append(cell.column)
    if reasons:
        lines += ["", "Not run:", ""]
        lines += [f"- {reason} ({', '.join(columns)})" for reason, columns in reasons.items()]
    return "\n".join(lines) + "\n"


def number(value: float | None, form: str) -> str:
    """A published number in a format; a dash where none was published."""
    return "-" if value is None else format(value, form)


def listing(cells: Sequence[Cell]) -> str:
    """Every row with its recipe, the paper's numbers, and whether it can run here."""
    lines = []
    for row in dict.fromkeys(c.row for c in cells):
        mine = [c for c in cells if c.row == row]
        for recipe in dict.fromkeys(c.recipe for c in mine):
            part = [c for c in mine if c.recipe == recipe]
            states = list(dict.fromkeys(c.problem or "can run" for c in part))
            numbers = ", ".join(f"{c.column}: {number(c.paper, 'g')}" for c in part)
            lines.append(f"{row:22} {recipe:44} {'; '.join(states)}\n{'':22} paper: {numbers}")
    return "\n".join(lines)


def write_files(out: Path, table: str, text: str, cells: Sequence[Cell]) -> None:
    """TABLE.md, TABLE.csv and TABLE.json."""
    rows = [cell.as_row() for cell in cells]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(out / f"{table}.md", text.encode())
    write_atomically(out / f"{table}.csv", buffer.getvalue().encode())
    write_json(out / f"{table}.json", rows)


def main(words: list[str] | None = None) -> int:
    """Run the command line `words`; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help=f"one of {', '.join(table_names())}")
    parser.add_argument("--list", action="store_true", help="say what could run, and run nothing")
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="DIR", help="folders to look for data in")
    parser.add_argument("--scale", choices=("short", "paper"), default="paper", help="short: one small budget for all")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--columns", nargs="+", help="only these columns")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides for every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/reproduce"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"), help="where the tables are written")
    given = parser.parse_args(words)
    try:
        if given.seeds < 1:
            raise ValueError(f"--seeds is {given.seeds}: give at least 1")
        title, cells = load_table(given.table)
        cells = chosen(cells, given.rows, given.columns)
    except ValueError as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
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
    for cell in cells:
        if cell.problem is None and cell.results and not cell.percentages():
            cell.problem = f"no class is {cell.metric}-shot"
        elif cell.problem is None and len(cell.results) < given.seeds:
            cell.problem = f"stopped before {given.seeds - len(cell.results)} of {given.seeds} seeds had their turn"
    text = markdown(title, cells, given.scale, given.seeds)
    print(text)
    if cells:
        write_files(given.out, given.table, text, cells)
    return code


if __name__ == "__main__":
    sys.exit(main())
