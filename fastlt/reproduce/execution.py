"""Runs the runs that are missing, each in a process of its own and under a lock, and collects their results."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from fastlt import file_lock
from fastlt.reproduce.plan import Run, plan_run
from fastlt.reproduce.tables import Cell
from fastlt.run.checkpoint import read_json
from fastlt.run.folder import result_file
from loaders.stored.forked_workers import signals_held


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
                        cell.results.append(read_json(result_file(run.folder)))
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
        # The trainer inherits the lock with its output: a run that outlived the process that started it is waited for.
        if not file_lock.take(output.fileno(), log):
            print(f"waiting for {run.name}, which another process trains", file=sys.stderr, flush=True)
            file_lock.take(output.fileno(), log, wait=True)
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
    process = None
    try:
        with signals_held():
            # In a session of its own, so that Ctrl-C reaches it once, through us.
            process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        return process.wait()
    except KeyboardInterrupt:
        if process is not None:
            process.terminate()
            process.wait()
        raise


def say_what_is_missing(cells: Sequence[Cell], seeds: int) -> None:
    """Give every cell that has no number, or not one for each of `seeds`, its reason."""
    for cell in cells:
        if cell.problem is None and cell.results and not cell.percentages():
            cell.problem = f"no class is {cell.metric}-shot"
        elif cell.problem is None and len(cell.results) < seeds:
            cell.problem = f"stopped before {seeds - len(cell.results)} of {seeds} seeds had their turn"
