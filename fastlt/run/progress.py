"""Where a run stands, the time it has taken, and the time it will take still."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastlt.state import Batch

SMOOTHED_OVER = 3  # validations whose mean `select: smoothed` compares


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint.

    stage: position among the recipe's stages. iteration: within the stage. done: iterations over all stages.
    images: trained on, by all processes.
    aside_s: time that was not training, by what it went into.
    scores: validation top-1 of the stage's last evaluations, at most SMOOTHED_OVER, the newest at the end.
    best: validation top-1 of the stage's best checkpoint.
    smoothed: the same mean over SMOOTHED_OVER evaluations of the stage's smoothed checkpoint.
    class_weights: (C,), the last that were logged; None before, and with methods that have none.
    parts: where the run went on under other circumstances, and which: see `begin_part`.
    """

    stage: int = 0
    iteration: int = 0
    done: int = 0
    train_s: float = 0.0
    wait_s: float = 0.0
    images: int = 0
    aside_s: dict[str, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    best: float = -1.0
    smoothed: float = -1.0
    class_weights: Tensor | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)

    def begin_part(self, circumstances: dict[str, Any], changes: list[str]) -> list[str]:
        """The run begins, or goes on, under these circumstances; returns in which of them they are others than before.

        changes: of the recipe, that the result has to tell of. A part is noted only when something is another.
        """
        before = self.parts[-1] if self.parts else circumstances
        others = [f"{k}: {before.get(k)!r} and {v!r}" for k, v in circumstances.items() if v != before.get(k)]
        if not self.parts or others or changes:
            self.parts.append({"from_iteration": self.done, **circumstances, "changes": changes})
        return others

    def count(self, images: int) -> None:
        """One more iteration is done, with so many images over all processes."""
        self.iteration += 1
        self.done += 1
        self.images += images

    def next_stage(self) -> None:
        """The stage is done."""
        self.stage, self.iteration = self.stage + 1, 0
        self.scores, self.best, self.smoothed = [], -1.0, -1.0

    def score(self, select: str) -> float:
        """What the stage's checkpoint of this `select` was chosen by; negative where there is none yet."""
        # An earlier version kept the best score alone.
        scores = {"last": (self.scores or [self.best])[-1], "best": self.best, "smoothed": self.smoothed}
        return scores[select]

    def validated(self, top1: float, *, at_end: bool) -> list[str]:
        """The model was validated; returns the values of `select` for which it is the stage's checkpoint from now on.

        Small validation sets tie often; of equals the later is kept, it has trained longer.
        """
        self.scores = [*self.scores, top1][-SMOOTHED_OVER:]
        better = []
        if top1 >= self.best:
            self.best = top1
            better.append("best")
        mean = sum(self.scores) / len(self.scores)
        if mean >= self.smoothed and (len(self.scores) == SMOOTHED_OVER or at_end):
            self.smoothed = mean
            better.append("smoothed")
        return better

    @property
    def img_s(self) -> float:
        return self.images / self.train_s

    @property
    def data_wait_share(self) -> float:
        """The part of the training time in which the loop waited for training batches."""
        return self.wait_s / self.train_s


class Stopwatch:
    """Adds to a progress the time of training, and in it the time of waiting for batches."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.since = time.perf_counter()

    def start(self) -> None:
        """Leave out the time since the last `lap`."""
        self.since = time.perf_counter()

    def lap(self) -> None:
        """Add the time since `start` or the last `lap`."""
        now = time.perf_counter()
        self.progress.train_s += now - self.since
        self.since = now

    @contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """The time inside is no training; it is added to the progress under `what`. Training goes on afterwards."""
        began = time.perf_counter()
        yield
        self.start()
        self.progress.aside_s[what] = self.progress.aside_s.get(what, 0.0) + self.since - began

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, with the time spent waiting for each added to the progress.

        The wait for the first is left out, of the time of training too: loaders compile and start workers in it.
        """
        self.lap()
        with self.aside("first batch"):
            batch = next(batches)
        while True:
            yield batch
            started = time.perf_counter()
            batch = next(batches)
            self.progress.wait_s += time.perf_counter() - started


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a run before its loaders are open. iterations, evaluate_every: in iterations."""

    name: str
    method: str
    batch_size: int
    iterations: int
    evaluate_every: int

    def evaluations_after(self, done: int) -> int:
        """The evaluations that come after so many iterations; the last iteration has one in any case."""
        regular = self.iterations // self.evaluate_every - done // self.evaluate_every
        return regular + (done < self.iterations and self.iterations % self.evaluate_every > 0)


class TimeLeft:
    """How long a run will take still, over all stages, with their evaluations and the test at the end.

    A stage goes by its own rate once it has one, and until then by that of the latest stage, of the same method if
    there is one, image for image.

    progress: where the run stands. stages: of the recipe. tested: images of the tests for one of an evaluation.
    """

    def __init__(
        self,
        progress: Progress,
        stages: Sequence[PlannedStage],
        tested: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.progress, self.stages, self.tested, self.clock = progress, stages, tested, clock
        self.image_s: dict[str, float] = {}  # seconds for an image of training, by method; the latest at the end
        self.evaluation_s: list[float] = []
        self.began: tuple[float, int] | None = None

    def begin(self) -> None:
        """The first iteration in a stage is done, and all that compiles in it: from here on it counts."""
        self.began = self.clock(), self.progress.iteration

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The time inside is that of an evaluation, and not of iterations."""
        since = self.clock()
        yield
        self.evaluation_s.append(self.clock() - since)
        if self.began is not None:
            self.began = self.began[0] + self.evaluation_s[-1], self.began[1]

    def iteration_s(self) -> float | None:
        """Seconds an iteration of the stage that is being trained; None before the second one."""
        if self.began is None or self.progress.iteration == self.began[1]:
            return None
        return (self.clock() - self.began[0]) / (self.progress.iteration - self.began[1])

    def seconds(self) -> tuple[float, bool] | None:
        """The time left, and whether all of its parts have been measured; None where nothing has."""
        current, *later = self.stages[self.progress.stage :]
        rate = self.iteration_s()
        if rate is None:
            return None
        self.image_s.pop(current.method, None)  # to put it at the end
        self.image_s[current.method] = rate / current.batch_size
        total = rate * (current.iterations - self.progress.iteration)
        evaluations = current.evaluations_after(self.progress.iteration) + self.tested
        latest = list(self.image_s.values())[-1]
        for stage in later:
            total += self.image_s.get(stage.method, latest) * stage.batch_size * stage.iterations
            evaluations += stage.evaluations_after(0)
        measured = bool(self.evaluation_s) and all(stage.method in self.image_s for stage in later)
        mean = sum(self.evaluation_s) / len(self.evaluation_s) if self.evaluation_s else 0.0
        return total + mean * evaluations, measured

    def end(self) -> None:
        """The stage is done, or given up."""
        self.began = None

    def __str__(self) -> str:
        """`1:02:03 left`; `about` where a part has not been measured."""
        left = self.seconds()
        if left is None:
            return "time left not known yet"
        return f"{'' if left[1] else 'about '}{clock_time(left[0])} left"


def clock_time(seconds: float) -> str:
    """`2:03` of minutes, `1:02:03` of hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
