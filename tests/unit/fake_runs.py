"""Runs of a campaign without training: small programs that count, save, resume and end as the trainer does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastlt.reproduce.tables import Cell

# Counts to `steps`, every count being a checkpoint, and writes when it began and ended.
PROGRAM = """
import json, os, pathlib, signal, sys, time
from fastlt.parent_process import LAUNCHER, end_with_parent
name, folder, steps, fails = sys.argv[1], pathlib.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "fails"
end_with_parent(int(os.environ[LAUNCHER]), signal.SIGTERM)
def note(what):
    with (folder.parent / "events.jsonl").open("a") as file:
        file.write(json.dumps([time.monotonic(), name, what]) + "\\n")
def stop(*_):
    note("stopped")
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
folder.mkdir(exist_ok=True)
state, part = folder / "state", folder / "state.part"
count = int(state.read_text()) if state.exists() else 0
note(f"began at {count} nice {os.getpriority(os.PRIO_PROCESS, 0)}")
while count < steps:
    time.sleep(0.02)
    count += 1
    part.write_text(str(count))
    part.replace(state)
if fails:
    note("failed")
    sys.exit("the disk is full")
result = {"name": name, "top1": 0.5, "many": 0.6, "medium": 0.4, "few": None, "ece": 0.1, "train_s": 2.0,
          "aside_s": {"test": 1.0}, "select": "last", "device": "cpu"}
(folder / "result.json").write_text(json.dumps(result))
note("ended")
"""


@dataclass(frozen=True)
class FakeRun:
    """Can be asked what `fastlt.reproduce.plan.TrainingRun` can."""

    name: str
    folder: Path
    steps: int
    cost: float
    needs: tuple[FakeRun, ...] = ()
    fails: bool = False

    @property
    def identity(self) -> str:
        return self.name

    def command(self, threads: int | None) -> list[str]:
        return [sys.executable, "-c", PROGRAM, self.name, str(self.folder), str(self.steps), "fails" * self.fails]

    def prepare(self) -> None:
        assert all(need.finished() for need in self.needs), f"{self.name} is started before those that it needs"

    def finished(self) -> bool:
        return (self.folder / "result.json").exists()


def cell(row: str, wanted: int = 1) -> Cell:
    return Cell(row, "column", 50.0, "recipe", [], wanted=wanted)


def plan(runs: Sequence[FakeRun]):
    """In the place of `plan_run`: the run that is called as the row and the seed."""
    by_name = {run.name: run for run in runs}
    return lambda cell, _, seed: by_name[f"{cell.row}-{seed}"]


def campaign(folder: Path) -> tuple[list[Cell], list[FakeRun]]:
    """Three rows, two of them on the first stage of the first, and two seeds of each."""
    runs = []
    for seed in (0, 1):
        first = FakeRun(f"first-{seed}", folder / f"first-{seed}", 25, 25)
        # The first long one still runs when a test kills it; the second has nothing to wait for.
        runs += [first, FakeRun(f"long-{seed}", folder / f"long-{seed}", 10 if seed else 120, 120)]
        runs += [FakeRun(f"{row}-{seed}", folder / f"{row}-{seed}", 3, 3, (first,)) for row in ("head", "tail")]
    return [cell(row, wanted=2) for row in ("first", "long", "head", "tail")], runs


def events(folder: Path) -> list[tuple[float, str, str]]:
    path = folder / "events.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
