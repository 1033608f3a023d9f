"""The checkpoints of a run: the last state, to resume from, and the best model of each stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from fastlt.device.random_states import random_states, restore_random_states
from fastlt.models import Classifier
from fastlt.models.trained_state import WEIGHTS, load_trained_state, trained_state
from fastlt.recipe import Standing, changes, recipe_from_tree
from fastlt.run import checkpoint
from fastlt.run.background import BackgroundSaves, on_host
from fastlt.run.context import RunContext
from fastlt.run.folder import divergence_file, last_checkpoint, recipe_file, stage_checkpoint, versions
from fastlt.run.inputs import RunInputs
from fastlt.run.main_process import from_main, on_main
from fastlt.run.progress import Progress
from fastlt.run.redistribution import redistributed
from fastlt.steps import Step
from loaders.stored.damage import DamageError

log = logging.getLogger(__name__)

# What a step holds that differs between processes: each has its own stream of augmentations and share of the meta set.
PER_PROCESS = ("augment", "meta_augment", "class_accuracy", "second_augment")


@dataclass(frozen=True)
class SavedRun:
    """A last checkpoint as this process reads it.

    shared, own: the parts of `Step.state_dict` that all processes have in common, and those of this one.
    backends: see `StageLoaders`. buffers: of the model, by name. random: of `random_states`.
    average, average_buffers: of the average of the model's weights, empty where there is none.
    changes: in what the recipe is another one than when it was saved, a line each; those that a result has to tell of.
    """

    progress: Progress
    shared: dict[str, Any]
    own: dict[str, Any]
    backends: dict[str, str]
    buffers: dict[str, Any]
    random: dict[str, Any]
    changes: list[str]
    average: dict[str, Any]
    average_buffers: dict[str, Any]

    def restore(self, step: Step, average: Classifier | None = None) -> None:
        """Put the step, its model and the default random generators where they were. Changes them in place.

        average: of the model's weights, likewise.
        """
        step.load_state_dict({**self.shared, **self.own})
        restore_random_states(self.random)
        for name, buffer in step.model.moving_buffers().items():
            buffer.copy_(self.buffers[name])
        if average is not None:
            load_trained_state(average, self.average)
            for name, buffer in average.moving_buffers().items():
                buffer.copy_(self.average_buffers[name])


class Checkpoints:
    """Writes and reads the files in `checkpoints/` of the run folder.

    They are written in the background. Every process calls `finish` before a file is read, and before a run says that
    it has saved one.
    """

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self.background = BackgroundSaves()
        self.last_saved = time.monotonic()
        self.saved: tuple[str, int] | None = None
        # Whose checkpoints these are.
        self.origin = {"recipe": context.recipe.to_tree(), "inputs": context.inputs.inputs.to_tree()}

    def standing(self) -> str:
        """Where the last checkpoint is, in words."""
        if self.saved is None:
            return f"No checkpoint was saved in {self.context.folder} before"
        stage, iteration = self.saved
        return f"The last checkpoint in {self.context.folder} is of iteration {iteration} of stage {stage}, from before"

    def due(self) -> bool:
        """Whether it is time for another checkpoint, by this process's clock, or for the error of the one before."""
        return self.background.failed or time.monotonic() - self.last_saved > self.context.recipe.checkpoint_every_s

    def finish(self) -> None:
        """Wait until all that was saved is written; every process learns of a ValueError."""
        on_main(self.context.accelerator, self.background.finish)

    def close(self) -> None:
        """Wait until all that this process saved is written; no other process is asked."""
        self.background.close()

    def _load(self, path: Path) -> dict[str, Any]:
        """The newest whole version of a file, which the main process reads and sends to the others.

        ValueError, on every process, when there is none.
        """
        device = self.context.device
        return from_main(self.context.accelerator, lambda: checkpoint.load_newest(path, device, set_aside=True)[1])

    def _save(self, path: Path, state: dict[str, Any], then: Callable[[], object] | None = None) -> None:
        """Let a file be written on the main process; the others learn of the ValueError of an earlier one.

        then: called when the file is there.
        """
        keep = self.context.recipe.checkpoints_kept
        on_main(self.context.accelerator, lambda: self.background.save(path, state, keep=keep, then=then))

    def save_last(
        self, stage: str, step: Step, progress: Progress, backends: dict[str, str], average: Classifier | None = None
    ) -> None:
        """Let `last.pt` be written, on the main process; all of them take part. average: of the model's weights."""
        context, state = self.context, step.gather_state(step.state_dict())
        own = {"step": {k: state.pop(k) for k in PER_PROCESS}, "random": random_states()}
        own["backends"] = backends
        # BatchNorm's running statistics are those of each process's own batches.
        own["buffers"] = step.model.moving_buffers()
        if average is not None:
            own["average_buffers"] = average.moving_buffers()
        # Gathered in memory: a tensor on a GPU would be put on that GPU by every process that gets it. What one process
        # has is copied once, with the rest.
        processes = [own] if context.reducer.world_size == 1 else gather_object([on_host(own)])
        numbers = dict(vars(progress))
        state = {
            "step": state,
            "processes": processes,
            "class_weights": numbers.pop("class_weights"),
            "progress": numbers,
            "stage_name": stage,
            **({} if average is None else {"average": trained_state(average)}),
            **self.origin,
        }
        saved = stage, progress.iteration

        def written() -> None:
            self.saved = saved
            divergence_file(context.folder).unlink(missing_ok=True)

        self._save(last_checkpoint(context.folder), state, written)
        self.last_saved = time.monotonic()
        if not context.main:
            self.saved = saved

    def load_last(self) -> SavedRun | None:
        """The run to resume, if there is one; ValueError when it is damaged.

        For another number of processes than saved it, see `redistributed`.
        """
        context, path = self.context, last_checkpoint(self.context.folder)
        if not on_main(context.accelerator, lambda: bool(versions(path))):
            return None
        state = self._load(path)
        told = self._check_origin(path, state)
        progress = Progress(**state["progress"], class_weights=state["class_weights"])
        self.saved = state["stage_name"], progress.iteration
        self._check_best(state["stage_name"], progress)
        context.say(f"resuming {context.folder} at iteration {progress.iteration} of stage {state['stage_name']}")
        mine = self._own_state(state["processes"], progress)
        return SavedRun(
            progress=progress,
            shared=state["step"],
            own=mine["step"],
            backends=mine.get("backends", {}),
            buffers=mine["buffers"],
            random=mine["random"],
            changes=told,
            average=state.get("average", {}),
            average_buffers=mine.get("average_buffers", {}),
        )

    def _own_state(self, processes: list[dict[str, Any]], progress: Progress) -> dict[str, Any]:
        """What this process has to itself, of what the processes had that saved a checkpoint."""
        context, before = self.context, len(processes)
        rank, now = context.reducer.rank, context.reducer.world_size
        if before == now:
            return processes[rank]
        context.say(
            f"{before} processes saved it, {now} go on: the batches stay the same, augmentations are drawn anew, and "
            "running statistics are the means over the processes before"
        )
        return redistributed(processes, rank, now, seed=context.recipe.seed, done=progress.done)

    def _check_origin(self, path: Path, state: dict[str, Any]) -> list[str]:
        """ValueError for the checkpoint of another run; returns the changes of the recipe that a result has to tell of.

        What an earlier version saved says nothing of its origin, and is taken.
        """
        context = self.context
        if "inputs" in state:
            wrong = context.inputs.inputs.differences(RunInputs.from_tree(state["inputs"]))
            if wrong:
                raise ValueError(f"{path} is of a run on other data: {'; '.join(wrong)}; choose another name=...")
        if "recipe" not in state:
            return []
        # Whether the rate may be lower was asked when the run folder was looked at.
        standing = Standing(state["progress"]["stage"], diverged=state["stage_name"])
        found = changes(recipe_from_tree(state["recipe"]), context.recipe, standing)
        refused = [change.line for change in found if change.refused]
        if refused:
            raise ValueError(
                f"{path} is of another run than {recipe_file(context.folder).name} beside it; it differs in "
                "(there and here)\n  "
                + "\n  ".join(refused)
                + "\nput the recipe and the checkpoints of one run there, or choose another name=..."
            )
        return [change.line for change in found if change.told]

    def save_model(self, select: str, stage: str, models: Mapping[str, Classifier], progress: Progress) -> None:
        """Let a model of a stage be written that was just validated, on the main process.

        select: see `stage_checkpoint`. models: of `Stage.models`: the selected weights, and those that are kept beside
        them under their name.
        """
        model, *_ = models.values()
        beside = {name: trained_state(other)[WEIGHTS] for name, other in list(models.items())[1:]}
        state = {
            **trained_state(model),
            **beside,
            "top1": progress.score("last"),
            "score": progress.score(select),
            "iteration": progress.iteration,
            **self.origin,
        }
        self._save(stage_checkpoint(self.context.folder, select, stage), state)

    def load_model(self, select: str, stage: str, model: Classifier, weights: str = WEIGHTS) -> dict[str, Any]:
        """Put the weights that `save_model` wrote into `model`; returns their "top1" and "iteration".

        weights: "model", the selected ones, or the name of those that are kept beside them.
        """
        saved = self._load(stage_checkpoint(self.context.folder, select, stage))
        load_trained_state(model, {**saved, WEIGHTS: saved[weights]})
        return {key: saved[key] for key in ("top1", "iteration")}

    def _check_best(self, stage: str, progress: Progress) -> None:
        """When a best model of a stage that goes on is damaged, let an earlier one or the next be the best."""
        kinds = {"best", self.context.recipe.stages[stage].select} - {"last"}
        for select in sorted(kinds):  # in one order on all processes: each is read by one and sent to the others
            if progress.score(select) < 0:
                continue
            try:
                saved = self._load(stage_checkpoint(self.context.folder, select, stage))
                score = saved.get("score", saved["top1"])  # earlier versions kept the top-1 alone
            except DamageError as error:
                log.warning("%s", error)
                score = -1.0
            setattr(progress, select, min(progress.score(select), score))
