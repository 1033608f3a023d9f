"""Images a second of a recipe's training loop, against the same step fed one batch for ever: what the data costs.

    fastlt benchmark train recipes/digits_lt.yaml data.loader=ffcv

Everything is the recipe's: loader, augmentation, model, loss, method, meta batches, and `compile`: iterations are those
of training, captured in a CUDA graph where the recipe says so; where that cannot be, the reason is printed. Without an
argument it is recipes/digits_lt.yaml. Nothing is validated or saved, and the run folder is a temporary one.

augment_ms is what the augmentation of an iteration takes by itself: of the training batch, and of the meta batch where
there is one; where iterations are captured, in a graph of its own and without the draws. augment_share is its share of
an iteration on one batch for ever.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from fastlt.arguments import positive
from fastlt.benchmarks.augment import Captured
from fastlt.benchmarks.rounds import interleaved, report_speeds, row
from fastlt.benchmarks.stage_loop import parser, stage_of
from fastlt.device.available import wait_for
from fastlt.device.compiled import ready
from fastlt.recipe import load_recipe
from fastlt.run.context import RunContext
from fastlt.run.loading import endless
from fastlt.run.preflight import prepare
from fastlt.run.stage import Stage
from fastlt.run.trainer import Trainer
from fastlt.state import Batch, StepOutput

NAME = "fastlt benchmark train"
LOOP, ONE_BATCH = "training loop", "one batch for ever"


def main(arguments: list[str], prog: str = NAME) -> int:
    """Measure and print; returns the exit code. A mistake in the recipe is a ValueError."""
    options = parser(__doc__, NAME, prog, a_round=50)
    options.add_argument("--rounds", type=positive, default=5, help="measured rounds (default: 5)")
    words = options.parse_args(arguments)
    with tempfile.TemporaryDirectory() as runs:
        recipe = load_recipe(words.recipe, [*words.overrides, f"runs={runs}"])
        name = stage_of(recipe, words)
        context = prepare(recipe)
        stage = Trainer(context).build_stage(name)  # a loop of its own: the trainer's also logs and evaluates
        try:
            loop = _Loop(context, stage, words.iterations)
            if loop.not_compiled is not None:
                print(f"{prog}: not compiled: {loop.not_compiled}", file=sys.stderr)
            speeds = interleaved({LOOP: loop.fed, ONE_BATCH: loop.one_batch}, words.rounds)
            augment_s = loop.augment_s(words.rounds)
        finally:
            stage.loaders.close()
    iteration_s = len(loop.batch) / statistics.median(speeds[ONE_BATCH])
    settings = {
        "recipe": recipe.name,
        "stage": name,
        "loader": stage.loaders.train.backend,
        "batch_size": stage.recipe.batch_size,
        "device": str(context.device),
        "threads": torch.get_num_threads(),
        "compile": context.compile,
        **({} if loop.not_compiled is None else {"not_compiled": loop.not_compiled}),
        "data_wait_share": round(statistics.median(loop.wait_shares[1:]), 4),
        "augment_ms": round(1000 * augment_s, 4),
        "augment_share": round(augment_s / iteration_s, 4),
    }
    report_speeds([row(speeds, LOOP, bare=ONE_BATCH), row(speeds, ONE_BATCH)], as_json=words.json, settings=settings)
    return 0


class _Loop:
    """A stage's iterations as the trainer takes them; `fed` and `one_batch` run so many and return the images.

    not_compiled: why iterations are not compiled or captured although the recipe says so; None otherwise.
    """

    def __init__(self, context: RunContext, stage: Stage, iterations: int) -> None:
        self.context, self.stage, self.step, self.iterations = context, stage, stage.step, iterations
        train, meta = stage.loaders.train, stage.loaders.meta
        self.batches = endless(train, 0)
        self.meta_batches = None if meta is None else endless(meta, 0)
        self.iteration = 0
        self.wait_shares: list[float] = []
        self.step.train_mode()
        self._set_up()
        self.batch, self.meta_batch = self._next()
        self.iterate, self.not_compiled = ready(self.step, self.batch, self.meta_batch)

    def fed(self) -> int:
        images, waited, started, output = 0, 0.0, time.perf_counter(), None
        for _ in range(self.iterations):
            asked = time.perf_counter()
            batch, meta_batch = self._next()
            waited += time.perf_counter() - asked
            output = self._iterate(batch, meta_batch)
            images += len(batch)
        _wait_for(output)
        self.wait_shares.append(waited / (time.perf_counter() - started))
        return images

    def one_batch(self) -> int:
        output = None
        for _ in range(self.iterations):
            output = self._iterate(self.batch, self.meta_batch)
        _wait_for(output)
        return self.iterations * len(self.batch)

    def augment_s(self, rounds: int) -> float:
        """Seconds that the augmentation of one iteration takes, the median of the rounds after one for warming up."""
        run, times = self._augmentation(), []
        for _ in range(1 + rounds):
            wait_for(self.context.device)
            started = time.perf_counter()
            for _ in range(self.iterations):
                run()
            wait_for(self.context.device)
            times.append((time.perf_counter() - started) / self.iterations)
        return statistics.median(times[1:])

    def _augmentation(self) -> Callable[[], object]:
        """What augments the batches of one iteration: a graph where iterations are graphs, else the calls."""
        parts, batch = self.step.parts, self.batch
        chains = [(parts.augment, batch.images)]
        if parts.second_augment is not None:
            chains.append((parts.second_augment, batch.images if batch.second_crop is None else batch.second_crop))
        if self.step.uses_meta_batch():
            assert parts.meta_augment is not None
            assert self.meta_batch is not None
            chains.append((parts.meta_augment, self.meta_batch.images))

        if self.context.compile == "cudagraph" and self.not_compiled is None:
            return Captured(chains)
        return lambda: [chain(images) for chain, images in chains]

    def _iterate(self, batch: Batch, meta_batch: Batch | None) -> StepOutput:
        """One iteration with what goes with it in training."""
        self._set_up()
        self.iteration += 1
        return self.iterate(batch, meta_batch)

    def _set_up(self) -> None:
        """The beginning of an epoch and the learning rate; the schedule starts again where it ends."""
        if self.iteration % self.stage.per_epoch == 0:
            self.step.start_epoch(self.iteration // self.stage.per_epoch)
        self.stage.set_learning_rate(self.iteration % self.stage.iterations)

    def _next(self) -> tuple[Batch, Batch | None]:
        return next(self.batches), None if self.meta_batches is None else next(self.meta_batches)


def _wait_for(output: StepOutput | None) -> None:
    """Until the device has done all that led to a step's output; a round asks once."""
    assert output is not None, "a round has an iteration"
    output.loss.item()
