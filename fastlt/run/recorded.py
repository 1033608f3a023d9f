"""What a run folder says of the run in it: its recipe, what it reads, and whether it is finished."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from fastlt.recipe import Change, Recipe, RecipeError, Standing, changes, read_resolved, recipe_from_tree
from fastlt.run import checkpoint
from fastlt.run.atomic_file import RunFileError, read_json
from fastlt.run.divergence import recorded_divergence
from fastlt.run.folder import (
    inputs_file,
    is_finished,
    last_checkpoint,
    recipe_file,
    result_file,
    versions,
)
from fastlt.run.inputs import InputsRecord, RunInputs

log = logging.getLogger(__name__)


def saved_state(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint, on the host; None where there is none. DamageError when none is whole."""
    last = last_checkpoint(folder)
    return checkpoint.load_newest(last)[1] if versions(last) else None


def recorded_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run: that of `recipe.yaml`, or where it is absent or damaged, of the last checkpoint.

    None when no run has begun there, or one whose recipe an earlier version did not keep. ValueError when a result or a
    checkpoint is there whose recipe cannot be known.
    """
    path, problem = recipe_file(folder), "is not there"
    if path.exists():
        try:
            return read_resolved(path)
        except RecipeError as error:
            problem = f"cannot be read ({' '.join(str(error).split())})"
    state = saved_state(folder)
    if state is not None and "recipe" in state:
        _warn_once(f"{path} {problem}; taking the recipe that {last_checkpoint(folder).name} has")
        return recipe_from_tree(state["recipe"])
    if path.exists() or (state is None and result_file(folder).exists()):
        raise ValueError(
            f"{path} {problem}, and no checkpoint has the recipe of the run in {folder}; put it back, or choose "
            "another name=..."
        )
    if state is not None:
        _warn_once(f"{path} {problem}; that the run had this recipe cannot be checked")
    return None


def recorded_inputs(folder: Path) -> InputsRecord | None:
    """What the run reads, by `inputs.json`, or where that is absent or damaged, by the last checkpoint.

    None when neither says so: no run has begun, or an earlier version began it.
    """
    written = written_inputs(folder)
    if written is not None:
        return written
    state = saved_state(folder)
    return InputsRecord(RunInputs.from_tree(state["inputs"]), {}) if state is not None and "inputs" in state else None


def written_inputs(folder: Path) -> InputsRecord | None:
    """The content of `inputs.json`; None where it is absent or damaged."""
    path = inputs_file(folder)
    if not path.exists():
        return None
    try:
        return InputsRecord.from_tree(read_json(path, "the last checkpoint is asked instead"))
    except (ValueError, KeyError, TypeError) as error:
        _warn_once(f"{path} is damaged ({error})")
        return None


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def changed(recipe: Recipe, before: Recipe) -> list[Change]:
    """In what the run in the recipe's folder, whose recipe was `before`, is to have another one from now on."""
    found = changes(before, recipe, Standing(0))
    if not any(change.refused or change.trains_more for change in found):
        return found
    state, divergence = saved_state(recipe.folder), recorded_divergence(recipe.folder)
    diverged = None if divergence is None else divergence.stage
    if state is not None:
        return changes(before, recipe, Standing(state["progress"]["stage"], diverged))
    # Nothing was saved that could go on; where it diverged before that, it begins anew.
    found = changes(before, recipe, Standing(0, diverged))
    return [
        change if change.rule == "lower" or not change.trains_more else replace(change, rule="fixed")
        for change in found
    ]


def is_complete(recipe: Recipe) -> bool:
    """Whether the folder of a recipe holds its result: nothing is left to train or to measure."""
    folder = recipe.folder
    if not is_finished(folder) or readable_result(folder) is None:
        return False
    before = recorded_recipe(folder)
    return before is not None and not any(c.refused or c.trains_more for c in changed(recipe, before))


def readable_result(folder: Path) -> dict[str, Any] | None:
    """The content of `result.json`; None where it is absent or damaged, RunFileError where it may not be read."""
    path = result_file(folder)
    try:
        result = read_json(path) if path.exists() else None
    except RunFileError:
        raise  # it may not be damaged: the user may not read it
    except ValueError:
        return None
    return result if isinstance(result, dict) and "top1" in result else None
