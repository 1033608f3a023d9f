"""Capturing an iteration once and replaying its operations, and the questions that a step answers for it.

A captured iteration is the list of operations that one call of a step put on the device. Replaying puts the same
operations there again, and no Python runs. So a decision that the step made in Python stays as it was, and a number
that Python counts does not move. `Replayable` holds the answers for both: how the next iteration decides, and how its
counters move.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastlt.augment import Augment
from fastlt.state import Batch, StepOutput

# Takes a function of no arguments, runs it once for its operations, and returns what replays them and its result, which
# every replay overwrites.
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class Replayable:
    """What decides or counts in Python during an iteration, and still works where the iteration is replayed.

    variant: how the next iteration decides. An iteration is captured once for each variant that comes.
    counters, set_counters: capturing runs the Python of an iteration before the operations run; its counters are put
        back then.
    advance: moves the counters as one iteration does; called after each replay.
    fetch: brings what the next iteration reads to where a replay reads it; called before each replay.
    The answers here are those of `replayed_part`, or, without one, that nothing is decided and nothing counted.
    """

    def replayed_part(self) -> Replayable | None:
        """The part of this object that decides or counts, if there is one."""
        return None

    def variant(self) -> Hashable:
        """The decisions of the next iteration: two iterations with the same variant run the same operations."""
        part = self.replayed_part()
        return None if part is None else part.variant()

    def counters(self) -> Any:
        """The numbers in Python that an iteration changes."""
        part = self.replayed_part()
        return None if part is None else part.counters()

    def set_counters(self, counters: Any) -> None:
        """Put the numbers that `counters` returned back."""
        part = self.replayed_part()
        if part is not None:
            part.set_counters(counters)

    def advance(self) -> None:
        """Change the counters as an iteration does."""
        part = self.replayed_part()
        if part is not None:
            part.advance()

    def fetch(self) -> None:
        """Have what the next iteration reads in its place."""
        part = self.replayed_part()
        if part is not None:
            part.fetch()


class ReplayedParts(Protocol):
    """What replaying a step needs of its parts; see `fastlt.steps.StepParts`."""

    @property
    def augment(self) -> Augment: ...
    @property
    def meta_augment(self) -> Augment | None: ...


class ReplayedStep(Protocol):
    """What replaying needs of a step, which is `Replayable` too; see `fastlt.steps.Step`."""

    @property
    def parts(self) -> ReplayedParts: ...

    def __call__(self, batch: Batch, meta_batch: Batch | None = None) -> StepOutput: ...
    def uses_meta_batch(self) -> bool: ...
    def variant(self) -> Hashable: ...
    def counters(self) -> Any: ...
    def set_counters(self, counters: Any) -> None: ...
    def advance(self) -> None: ...
    def fetch(self) -> None: ...


class CudaCapture:
    """`Capture` by CUDA graphs, which share their memory: what one returned is gone when another is replayed.

    No kernel runs while a graph is captured, so its first replay is its first run. What fails while it is captured is
    raised as it was.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, current, reason = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), None
        # Where it has not met a convolution before, cuDNN would time its ways to do it, which no capture allows.
        benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            # Loaders' threads go on allocating and copying meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                try:
                    result = function()
                except Exception as error:
                    reason = error
                    raise
        except Exception:
            # To end a capture that failed fails, too: it says less, and leaves the capture's stream the current one.
            torch.cuda.set_stream(current)
            if reason is not None:
                raise reason from None
            raise
        finally:
            torch.backends.cudnn.benchmark = benchmark
        return graph.replay, result


class GraphedStep:
    """A step whose iterations are captured once for each of their variants and replayed; called like the step.

    Batches and random choices are copied to where the graphs read them. What a call returns lies in the graph's memory
    and is overwritten by the next call.
    """

    def __init__(self, step: ReplayedStep, batch: Batch, meta_batch: Batch | None, capture: Capture) -> None:
        self.step, self.capture = step, capture
        self.batch = held(batch)
        self.meta_batch = None if meta_batch is None else held(meta_batch)
        self.graphs: dict[Hashable, tuple[Callable[[], None], StepOutput]] = {}

    def __call__(self, batch: Batch, meta_batch: Batch | None) -> StepOutput:
        step, parts = self.step, self.step.parts
        overwrite(self.batch, batch)
        parts.augment.hold(self.batch.images)
        if step.uses_meta_batch():
            assert self.meta_batch is not None
            assert meta_batch is not None
            assert parts.meta_augment is not None
            overwrite(self.meta_batch, meta_batch)
            parts.meta_augment.hold(self.meta_batch.images)
        step.fetch()
        variant = step.variant()
        if variant not in self.graphs:
            counters = step.counters()
            self.graphs[variant] = self.capture(lambda: step(self.batch, self.meta_batch))
            step.set_counters(counters)
        replay, output = self.graphs[variant]
        replay()
        step.advance()
        return output


def held(batch: Batch) -> Batch:
    """A copy of a batch whose memory is kept."""
    return replace(batch, **{name: t.clone() for name, t in tensors_of(batch).items()})


def overwrite(kept: Batch, batch: Batch) -> None:
    """Put the tensors of a batch into the memory of a `held` one of the same shapes."""
    for name, tensor in tensors_of(batch).items():
        getattr(kept, name).copy_(tensor, non_blocking=True)


def tensors_of(batch: Batch) -> dict[str, Tensor]:
    """The fields of a batch that are tensors."""
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}
