"""Training from Python, in a program or a notebook: the process is afterwards as it was."""

from __future__ import annotations

import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from fastlt.device.random_states import random_states, restore_random_states
from fastlt.run.lock import unlock_folder
from fastlt.run.log import result_table
from fastlt.run.preflight import prepare, read_recipe
from fastlt.run.processes import find
from fastlt.run.result import recorded_result
from fastlt.run.stopping import Interrupted, StoppingInside
from fastlt.run.trainer import Trainer

_one_at_a_time = threading.Lock()


@dataclass(frozen=True)
class FinishedRun:
    """A run that has been trained and tested.

    folder: the run folder. result: the content of its `result.json`, such as `result["top1"]`.
    """

    folder: Path
    result: dict[str, Any]


def fit(recipe: str | Path, *overrides: str) -> FinishedRun:
    """Train what a recipe describes, or go on where its run folder stands: `fit("digits_lt", "seed=1", "name=mine")`.

    recipe, overrides: as `fastlt train` takes them. Prints what that prints, with a widget for the progress bar in a
    notebook. Threads, random generators, signal handlers and warnings of the process are afterwards what they were.
    Works in any thread, one run at a time.

    ValueError for a mistake in the recipe or the data and for a full disk, FloatingPointError when numbers are not
    finite any more, ReaderError, a RuntimeError, for images that cannot be read on. A signal, such as a notebook's
    interrupt, lets the iteration finish and a checkpoint be saved, and is then raised anew: Ctrl-C is a
    KeyboardInterrupt. The same call goes on from there. Of several processes that a launcher has started, an error of
    one is raised in that one, and ends the others with its message; ConnectionError when one of them does not come.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise ValueError("another run is being trained in this process: wait for its end, or start a process for it")
    try:
        with process_as_before():
            return _fit(recipe, overrides)
    except Interrupted as stopped:
        signal.raise_signal(stopped.signal)  # to the handlers from before, which are back
        raise
    finally:
        _one_at_a_time.release()


def _fit(recipe: str | Path, overrides: tuple[str, ...]) -> FinishedRun:
    processes = find()
    try:
        return _fit_here(recipe, overrides)
    except BaseException as error:
        failure = processes.first_failure(error)
        if failure is None or failure.rank == processes.rank:
            raise
        raise RuntimeError(str(failure)) from None
    finally:
        processes.close()


def _fit_here(recipe: str | Path, overrides: tuple[str, ...]) -> FinishedRun:
    loaded = read_recipe(recipe, overrides)
    trainer = None
    try:
        context = prepare(loaded)
        result = recorded_result(context)
        if result is None:
            trainer = Trainer(context, StoppingInside(context))
            result = trainer.fit()
        context.say(f"\n{result_table(result, context.counts)}\n\nrun folder: {context.folder}")
        return FinishedRun(context.folder, result)
    finally:
        if trainer is not None:
            trainer.evaluation.close()
        unlock_folder(loaded.folder)


@contextmanager
def process_as_before() -> Iterator[None]:
    """What a run sets in this process is afterwards as it was: threads, generators, warnings, Accelerate's state."""
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    generators = random.getstate(), np.random.get_state(), random_states()
    accelerate = dict(AcceleratorState._shared_state)
    AcceleratorState._reset_state()  # it allows one precision a process
    try:
        with warnings.catch_warnings():
            # Torch says so of its own code when it first takes a forward-mode derivative.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
            yield
    finally:
        AcceleratorState._reset_state()
        AcceleratorState._shared_state.update(accelerate)
        random.setstate(generators[0])
        np.random.set_state(generators[1])
        restore_random_states(generators[2])
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = benchmark
