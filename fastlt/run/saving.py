"""The checkpoints of a run: the last state, to resume from, and the best model of each stage."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from fastlt.device.random_states import random_states, restore_random_states
from fastlt.run import checkpoint
from fastlt.run.context import RunContext
from fastlt.run.folder import best_checkpoint, last_checkpoint
from fastlt.run.progress import Progress
from fastlt.steps import Step

# What a step holds that differs between processes: each has its own stream of augmentations and share of the meta set.
PER_PROCESS = ("augment", "meta_augment", "class_accuracy", "second_augment")


@dataclass(frozen=True)
class SavedRun:
    """A last checkpoint as this process reads it.

    shared, own: the parts of `Step.state_dict` that all processes have in common, and those of this one.
    backends: see `StageLoaders`. buffers: of the model, by name. random: of `random_states`.
    """

    progress: Progress
    shared: dict[str, Any]
    own: dict[str, Any]
    backends: dict[str, str]
    buffers: dict[str, Any]
    random: dict[str, Any]

    def restore(self, step: Step) -> None:
        """Put the step, its model and the default random generators where they were. Changes them in place."""
        step.load_state_dict({**self.shared, **self.own})
        restore_random_states(self.random)
        for name, buffer in step.model.named_buffers():
            buffer.copy_(self.buffers[name])


class Checkpoints:
    """Writes and reads the files in `checkpoints/` of the run folder."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.last_saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time for another checkpoint, by this process's clock."""
        return time.monotonic() - self.last_saved > self.context.recipe.checkpoint_every_s

    def save_last(self, stage: str, step: Step, progress: Progress, backends: dict[str, str]) -> None:
        """Write `last.pt`, on the main process; all of them take part."""
        context, state = self.context, step.state_dict()
        own = {"step": {k: state.pop(k) for k in PER_PROCESS}, "random": random_states()}
        own["backends"] = backends
        # BatchNorm's running statistics are those of each process's own batches.
        own["buffers"] = {k: b.cpu() for k, b in step.model.named_buffers()}
        processes = gather_object([own])
        if context.main:
            numbers = dict(vars(progress))
            state = {
                "step": state,
                "processes": processes,
                "class_weights": numbers.pop("class_weights"),
                "progress": numbers,
                "stage_name": stage,
            }
            checkpoint.save(last_checkpoint(context.folder), state)
        context.accelerator.wait_for_everyone()
        self.last_saved = time.monotonic()

    def load_last(self) -> SavedRun | None:
        """The run to resume, if there is one; ValueError when it is damaged or of another number of processes."""
        context, path = self.context, last_checkpoint(self.context.folder)
        if not path.exists():
            return None
        state = checkpoint.load(path, context.device)
        if len(state["processes"]) != context.reducer.world_size:
            raise ValueError(
                f"{path} was saved by {len(state['processes'])} processes, this run has {context.reducer.world_size}: "
                "launch as many as before, or choose another name=..."
            )
        progress = Progress(**state["progress"], class_weights=state["class_weights"])
        context.say(f"resuming {context.folder} at iteration {progress.iteration} of stage {state['stage_name']}")
        mine = state["processes"][context.reducer.rank]
        return SavedRun(
            progress=progress,
            shared=state["step"],
            own=mine["step"],
            backends=mine.get("backends", {}),
            buffers=mine["buffers"],
            random=mine["random"],
        )

    def save_best(self, stage: str, model: nn.Module, top1: float, iteration: int) -> None:
        """Write `best_<stage>.pt`, on the main process."""
        if self.context.main:
            state = {"model": model.state_dict(), "top1": top1, "iteration": iteration}
            checkpoint.save(best_checkpoint(self.context.folder, stage), state)

    def load_best(self, stage: str, model: nn.Module) -> dict[str, Any]:
        """Put the best weights of a stage into `model`; returns the "top1" and the "iteration" of that checkpoint."""
        self.context.accelerator.wait_for_everyone()
        best = checkpoint.load(best_checkpoint(self.context.folder, stage), self.context.device)
        model.load_state_dict(best.pop("model"))
        return best
