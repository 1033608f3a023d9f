"""Runs the runs that are missing, several at once, each in a process of its own and under a lock."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fastlt import file_lock
from fastlt.parent_process import LAUNCHER
from fastlt.reproduce.plan import Run, TrainingRun, plan_run
from fastlt.reproduce.shared_results import SharedResults
from fastlt.reproduce.tables import Cell
from fastlt.run.atomic_file import read_json
from fastlt.run.folder import result_file
from fastlt.run.progress import clock_time
from loaders.cores import available_cores
from loaders.stored.forked_workers import signals_held

POLL_S = 0.2
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)


@dataclass(eq=False)
class Task:
    """A run that is not finished.

    label: of the first cell that asks for it. seed: of that cell. place: of the task among all. needs: those that have
    to be done before. asked: the cells that want its result, each with the seed that it is for them.
    process, output: while it runs; its output file holds the lock. told: whether its wait for another process was said.
    done: whether its result is there. over: whether nothing more is tried.
    """

    run: Run
    label: str
    seed: int
    place: int
    needs: list[Task]
    asked: list[tuple[Cell, int]] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    output: IO[str] | None = None
    told: bool = False
    done: bool = False
    over: bool = False

    @property
    def log(self) -> Path:
        return self.run.folder.with_name(f"{self.run.name}.log")


class Campaign:
    """All runs that the cells of a table want.

    One seed of every cell comes before the next, and of one seed the shortest run first, by its estimated cost; a run
    comes after those that it needs. A run that fails takes those with it that need it, and no others.

    cells: get their results, and the reason of a failure as `problem`. runs: where run folders are. jobs: processes at
    once, which share the cores. nice: what is added to their niceness. shared: results of runs on other machines; those
    of the runs here are added. changed: called when a cell has changed.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        runs: Path,
        *,
        jobs: int = 1,
        nice: int = 0,
        shared: SharedResults | None = None,
        changed: Callable[[], object] = lambda: None,
    ) -> None:
        self.runs, self.jobs, self.nice, self.changed = runs, jobs, nice, changed
        self.shared = SharedResults() if shared is None else shared
        self.threads = None if jobs == 1 else max(1, available_cores() // jobs)
        self.tasks: dict[str, Task] = {}
        self.failed: dict[str, str] = {}
        able = {id(cell) for cell in cells if cell.problem is None}
        for seed in range(max((cell.wanted for cell in cells), default=0)):
            for cell in cells:
                if seed < cell.wanted:
                    self._ask(cell, seed, can_run=id(cell) in able)

    def _ask(self, cell: Cell, seed: int, *, can_run: bool) -> None:
        """Take the result of a cell that is there, or note the run that it takes."""
        try:
            run = plan_run(cell, self.runs, seed)
            result = self._result_here(run) if run.finished() else self._result_elsewhere(run)
            if result is not None:
                cell.results[seed] = result
            elif can_run:
                self._task(run, cell.label(seed), seed).asked.append((cell, seed))
        except ValueError as error:  # a damaged file of an earlier run, or a recipe that is none here
            if can_run:
                cell.problem = self.failed[cell.label(seed)] = " ".join(str(error).split())

    def _result_here(self, run: Run) -> dict[str, Any]:
        result = read_json(result_file(run.folder))
        if isinstance(run, TrainingRun):
            self.shared.add(run.recipe, result)
        return result

    def _result_elsewhere(self, run: Run) -> dict[str, Any] | None:
        return self.shared.get(run.recipe) if isinstance(run, TrainingRun) else None

    def _task(self, run: Run, label: str, seed: int) -> Task:
        if run.identity not in self.tasks:
            needs = [self._task(need, f"{label}, for {run.name}", seed) for need in run.needs if not need.finished()]
            self.tasks[run.identity] = Task(run, label, seed, len(self.tasks), needs)
        return self.tasks[run.identity]

    def run(self) -> int:
        """Run everything; returns how many runs failed.

        Raises KeyboardInterrupt, and whatever else a signal raises, once all processes have saved a checkpoint.
        """
        self.runs.mkdir(parents=True, exist_ok=True)
        costs = {task: task.run.cost for task in self.tasks.values()}
        waiting = sorted(costs, key=lambda task: (task.seed, costs[task], task.place))
        clock = _Clock(costs)
        running: list[Task] = []
        try:
            while waiting or running:
                before = len(waiting), len(running)
                for task in [task for task in running if _poll(task) is not None]:
                    running.remove(task)
                    self._ended(task, clock)
                waiting = [task for task in waiting if not self._start(task, running)]
                if before == (len(waiting), len(running)):
                    time.sleep(POLL_S)
        finally:
            _stop(running)
        return len(self.failed)

    def _start(self, task: Task, running: list[Task]) -> bool:
        """Start a task if it can be, and add it to `running`; False while it has to wait."""
        reason = next((self.failed[need.run.identity] for need in task.needs if need.run.identity in self.failed), None)
        if reason is not None:
            self._fail(task, reason)
            return True
        if len(running) >= self.jobs or not all(need.done for need in task.needs):
            return False
        task.output = task.log.open("a", encoding="utf-8")
        # The trainer inherits the lock with its output: a run that outlived the process that started it is waited for.
        if not file_lock.take(task.output.fileno(), task.log):
            task.output.close()
            if not task.told:
                print(f"waiting for {task.run.name}, which another process trains", file=sys.stderr, flush=True)
            task.told = True
            return False
        try:
            if task.run.finished():  # by that other process
                self._finish(task)
                return True
            task.run.prepare()
        except (ValueError, OSError) as error:
            self._fail(task, " ".join(str(error).split()))
            return True
        print(f"running {task.run.name}: {task.label}", file=sys.stderr, flush=True)
        with signals_held():
            task.process = start(task.run.command(self.threads), task.output, self.nice)
            running.append(task)
        return True

    def _ended(self, task: Task, clock: _Clock) -> None:
        code = _poll(task)
        if code == 0:
            self._finish(task)
            if task.done:
                print(f"finished {task.run.name}: {clock}", file=sys.stderr, flush=True)
        elif code in STOPPED:
            self._fail(task, f"was stopped; the same command goes on with it (see {task.log})")
        else:
            lines = [line for line in task.log.read_text(encoding="utf-8").splitlines() if line.strip()]
            self._fail(task, f"failed with code {code}: {lines[-1] if lines else 'no output'} (see {task.log})")

    def _finish(self, task: Task) -> None:
        _close(task)
        try:
            result = self._result_here(task.run)
            for cell, seed in task.asked:
                cell.results[seed] = result
        except ValueError as error:
            self._fail(task, " ".join(str(error).split()))
            return
        task.done = task.over = True
        self.changed()

    def _fail(self, task: Task, reason: str) -> None:
        _close(task)
        self.failed[task.run.identity], task.over = reason, True
        for cell, _ in task.asked:
            cell.problem = cell.problem or reason
        print(f"not finished {task.run.name}: {reason}", file=sys.stderr, flush=True)
        self.changed()


class _Clock:
    """How long the runs that are left will take, by the time of those so far and the estimated costs of both."""

    def __init__(self, costs: dict[Task, float]) -> None:
        self.costs, self.began = costs, time.monotonic()

    def __str__(self) -> str:
        """`3 of 12 runs, about 1:02:03 left`."""
        done = sum(cost for task, cost in self.costs.items() if task.done)
        left = sum(cost for task, cost in self.costs.items() if not task.over)
        text = f"{sum(task.over for task in self.costs)} of {len(self.costs)} runs"
        return f"{text}, about {clock_time((time.monotonic() - self.began) * left / done)} left" if done else text


def start(words: list[str], output: IO[str], nice: int = 0) -> subprocess.Popen[bytes]:
    """Start a process, its output into a file. When this one ends, however it ends, it saves a checkpoint and ends."""
    if nice:
        words = ["nice", "-n", str(nice), *words]
    # In a session of its own, so that Ctrl-C reaches it once, through us.
    return subprocess.Popen(
        words,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, LAUNCHER: str(os.getpid())},
    )


def _poll(task: Task) -> int | None:
    """The exit code of a task's process, -N when killed by signal N; None while it runs."""
    assert task.process is not None, task
    return task.process.poll()


def _close(task: Task) -> None:
    if task.output is not None:
        task.output.close()


def _stop(running: Iterable[Task]) -> None:
    """Have processes save a checkpoint and end, and wait for that."""
    for task in running:
        assert task.process is not None, task
        task.process.terminate()
    for task in running:
        assert task.process is not None, task
        task.process.wait()
        _close(task)
