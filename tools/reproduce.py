"""Run the rows of the paper's result tables and put our numbers beside the paper's.

    python tools/reproduce.py table8 --list                       # every row, its recipe, whether it can run here
    python tools/reproduce.py table8 --data DIR --seeds 3         # run or resume what is missing, then the table
    python tools/reproduce.py table8 --scale short --rows Ours cRT --columns 100

Each cell's run is `fastlt/train.py RECIPE overrides... seed=S` in a process of its own; a finished run is not run
again, an interrupted one goes on. A cell of several runs ends with tools/ensemble.py on them. Leaves TABLE.md, .csv
and .json in --out. The paper's numbers, and which recipe belongs to which row, are in tools/paper_tables.yaml.
`--data` names folders with CIFAR's files or converted data sets.
Exit code: 0 done, 1 when a run failed, 2 for a mistake on the command line, 130 when stopped.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from fastlt.checkpoint import read_json, write_atomically, write_json  # noqa: E402
from fastlt.names import pick  # noqa: E402
from fastlt.recipe import Recipe, load_recipe  # noqa: E402
from loaders.dataset import ConvertedDataset  # noqa: E402

PAPER = Path(__file__).with_name("paper_tables.yaml")
CIFAR_FILES = {"cifar10": "cifar-10-", "cifar100": "cifar-100-"}

# `--scale short`: one budget for every row, so that rows can be compared with each other, not with the paper. A stage
# that starts from fresh weights is what differs; one that goes on from it gets a quarter of it. Stages that descend
# nothing (tau_norm) stay as they are.
SHORT_ITERATIONS = 400


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

    recipe: stem of a file of recipes/. overrides: words that make the recipe this cell's. metric: key of result.json.
    problem: why it was not run, None when it can be. results: one result.json a seed, in order.
    members: of an ensemble, its runs; `recipe` then names all of theirs, and `overrides` holds all of theirs.
    """

    row: str
    column: str
    paper: float
    recipe: str
    overrides: list[str]
    metric: str
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
            "runs": len(ours),
            "difference": None if mean is None else mean - self.paper,
            "train_s": statistics.mean(r["train_s"] for r in self.results) if self.results else None,
            "not_run": self.problem,
        }


def load_table(name: str, tables: Path = PAPER) -> tuple[str, list[Cell]]:
    """Title and cells of a table, row by row; cells in which the paper prints a dash are left out."""
    table = pick("table", name, yaml.safe_load(tables.read_text(encoding="utf-8")))
    cells = []
    for row in table["rows"]:
        for column, value in zip(table["columns"], row["values"], strict=True):
            if value is None:
                continue
            overrides = [
                *table.get("overrides", []),
                *column.get("overrides", []),
                *row.get("overrides", []),
                *row.get("by_column", {}).get(column["name"], []),
            ]
            recipes = row.get("ensemble") or [row.get("recipe") or column["recipe"]]
            place = (row["name"], column["name"], value)
            metric = column.get("metric", "top1")
            members = [Cell(*place, recipe, overrides, metric) for recipe in recipes]
            ensemble = Cell(*place, "+".join(recipes), overrides, metric, members=members)
            cells.append(ensemble if len(members) > 1 else members[0])
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
            cell.overrides = [*cell.overrides, *short_budget(load_recipe(cell.path, cell.overrides))]
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


def run_name(cell: Cell, scale: str, seed: int) -> str:
    """Recipe, what is overridden, budget and seed; equal cells of two tables share their runs."""
    # Where the data are does not change a result, so it does not change the name.
    words = [w for w in cell.overrides if not re.match(r"data\.(root|download|converted)=|runs=|num_threads=", w)]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:8]
    return f"{cell.recipe}-{scale}-{digest}-{seed}"


def command(cell: Cell, runs: Path, scale: str, seed: int) -> list[str]:
    """The command line of one run, or of what puts the runs of an ensemble together."""
    name = run_name(cell, scale, seed)
    if cell.members:
        folders = [str(runs / run_name(member, scale, seed)) for member in cell.members]
        return [sys.executable, str(ROOT / "tools" / "ensemble.py"), *folders, "--out", str(runs / name)]
    words = [*cell.overrides, f"runs={runs}", f"name={name}", f"seed={seed}"]
    return [sys.executable, str(ROOT / "fastlt" / "train.py"), str(cell.path), *words]


def run_cells(cells: Sequence[Cell], runs: Path, scale: str, seeds: int) -> int:
    """Run what is missing and put each result into its cells; returns how many runs failed."""
    failed: dict[str, str] = {}
    for cell in cells:
        for seed in range(seeds):
            name = run_name(cell, scale, seed)
            if cell.problem is None and name not in failed:
                problem = run_one(cell, runs, scale, seed)
                if problem is not None:
                    failed[name] = problem
            if name in failed:
                cell.problem = failed[name]
    return len(failed)


def run_one(cell: Cell, runs: Path, scale: str, seed: int) -> str | None:
    """One run, unless it is finished; its result goes into the cell. Returns why it failed, None when it did not."""
    for member in cell.members:
        problem = run_one(member, runs, scale, seed)
        if problem is not None:
            return problem
    name, words = run_name(cell, scale, seed), command(cell, runs, scale, seed)
    folder = runs / name
    if not (_put_together(folder, cell, seed) if cell.members else _finished(folder, words)):
        print(f"running {name}: {cell.row}, {cell.column}", file=sys.stderr, flush=True)
        runs.mkdir(parents=True, exist_ok=True)
        log = runs / f"{name}.log"
        with log.open("a", encoding="utf-8") as output:
            code = subprocess.run(words, stdout=output, stderr=subprocess.STDOUT).returncode
        if code in (130, 143, -2, -15):
            raise KeyboardInterrupt
        if code != 0:
            lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
            return f"failed with code {code}: {lines[-1] if lines else 'no output'} (see {log})"
    cell.results.append(read_json(folder / "result.json"))
    return None


def _finished(folder: Path, words: list[str]) -> bool:
    """Whether the folder holds the result of exactly this recipe; of another one, train.py refuses with the reason."""
    recorded = folder / "recipe.yaml"
    if not (folder / "result.json").is_file() or not recorded.is_file():
        return False
    return recorded.read_text(encoding="utf-8") == load_recipe(words[2], words[3:]).to_yaml()


def _put_together(folder: Path, cell: Cell, seed: int) -> bool:
    """Whether the folder holds the ensemble of the members' results as they are now."""
    if not (folder / "result.json").is_file():
        return False
    recorded = [(m["seed"], m["top1"]) for m in read_json(folder / "result.json")["members"]]
    return recorded == [(seed, m.results[-1]["top1"]) for m in cell.members]


# Telling


def markdown(title: str, cells: Sequence[Cell], scale: str, seeds: int) -> str:
    """The table as Markdown: a line a cell that was run, then what was not run and why."""
    budget = "the paper's length" if scale == "paper" else f"a short budget of {SHORT_ITERATIONS} iterations"
    lines = [f"# {title}", "", f"Top-1 in %, {budget}, {seeds} seed{'s' if seeds > 1 else ''} a row.", ""]
    lines += ["| row | column | paper | ours | difference | training, s |", "|---|---|---|---|---|---|"]
    for cell in cells:
        row = cell.as_row()
        if row["ours"] is None:
            continue
        spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
        lines.append(
            f"| {cell.row} | {cell.column} | {cell.paper:.2f} | {row['ours']:.2f}{spread} | {row['difference']:+.2f} "
            f"| {row['train_s']:.0f} |"
        )
    reasons: dict[str, list[str]] = {}
    for cell in cells:
        if cell.problem is not None:
            reasons.setdefault(f"{cell.row}: {cell.problem}", []).append(cell.column)
    if reasons:
        lines += ["", "Not run:", ""]
        lines += [f"- {reason} ({', '.join(columns)})" for reason, columns in reasons.items()]
    return "\n".join(lines) + "\n"


def listing(cells: Sequence[Cell]) -> str:
    """Every row with its recipe, the paper's numbers, and whether it can run here."""
    lines = []
    for row in dict.fromkeys(c.row for c in cells):
        mine = [c for c in cells if c.row == row]
        for recipe in dict.fromkeys(c.recipe for c in mine):
            part = [c for c in mine if c.recipe == recipe]
            states = list(dict.fromkeys(c.problem or "can run" for c in part))
            numbers = ", ".join(f"{c.column}: {c.paper:g}" for c in part)
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
    parser.add_argument("table", help="table6, table8, table9, table10, table11 or table12 of the supplement")
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
    try:
        code = 1 if run_cells(cells, given.runs.resolve(), given.scale, given.seeds) else 0
    except KeyboardInterrupt:
        print("stopped; the same command goes on from there", file=sys.stderr)
        code = 130
    for cell in cells:
        if cell.problem is None and not cell.percentages():
            cell.problem = f"no class is {cell.metric}-shot" if cell.results else "stopped before its turn"
    text = markdown(title, cells, given.scale, given.seeds)
    print(text)
    if cells:
        write_files(given.out, given.table, text, cells)
    return code


if __name__ == "__main__":
    sys.exit(main())
