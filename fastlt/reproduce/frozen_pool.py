"""The runs on frozen features in a few processes: results are files, so that a stopped table goes on."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlt.parent_process import end_with_parent
from fastlt.recipe import load_recipe
from fastlt.reproduce.frozen import BuiltModels, HeadRun, open_context, train_head
from fastlt.reproduce.plan import digest, result_digest
from fastlt.run.atomic_file import read_json, write_json
from fastlt.run.context import RunContext


@dataclass(frozen=True)
class Task:
    """A run with the words of its data set, the file of its result, and how many threads it computes with."""

    recipe: Path
    data_words: tuple[str, ...]
    run: HeadRun
    file: Path
    threads: int

    def result(self) -> dict[str, Any] | None:
        """What the file says; None before the run is over."""
        return read_json(self.file) if self.file.is_file() else None


def make_tasks(
    recipe: Path, data_words: Sequence[str], runs: Sequence[HeadRun], context: RunContext, folder: Path, threads: int
) -> list[Task]:
    """The tasks of a data set. A result is found again under the same recipe, words, images and weights alone.

    threads: of each run. Sums are rounded otherwise with another number, as on another machine: a result is the same
    in its meaning, and is found again. It says how many it was computed with.
    """
    alike = load_recipe(recipe, [*data_words, "num_threads=null"])
    identity = {"recipe": result_digest(alike), "inputs": context.inputs.inputs.to_tree()}
    return [
        Task(recipe, tuple(data_words), run, folder / f"{digest({**identity, 'words': run.words}, 16)}.json", threads)
        for run in runs
    ]


def run_tasks(tasks: Sequence[Task], jobs: int, done: Callable[[Task], None]) -> None:
    """Train what has no result yet, in `jobs` processes; `done` is called after each run.

    A KeyboardInterrupt waits for the runs that have begun. RuntimeError when a process ends by itself.
    """
    missing = [task for task in tasks if not task.file.is_file()]
    # A fork of this process would share its OpenMP threads, which are not there after a fork.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(os.getpid(),)) as pool:
        futures: dict[Future[None], Task] = {pool.submit(_train, task): task for task in missing}
        try:
            for future in as_completed(futures):
                future.result()
                done(futures[future])
        except BrokenProcessPool:
            raise RuntimeError("a process that trained heads ended by itself, for want of memory maybe") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# Of this process: the surroundings of its latest data set, and the models that runs on it begin with.
_contexts: dict[tuple[str, ...], tuple[RunContext, BuiltModels]] = {}


def _begin(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent decides
    end_with_parent(parent)
    # The process that made the tasks has built the network too, and has said what there is to say of its weights.
    logging.getLogger("fastlt.models").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)


def _train(task: Task) -> None:
    data_words = (*task.data_words, f"num_threads={task.threads}")
    if data_words not in _contexts:
        _contexts.clear()  # of one data set at a time, whose features fill memory
        _contexts[data_words] = open_context(load_recipe(task.recipe, data_words)), {}
    context, built = _contexts[data_words]
    result = train_head(context, task.recipe, [*data_words, *task.run.words], built)
    write_json(task.file, {**result, "threads": task.threads})
