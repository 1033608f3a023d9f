"""The runs that a cell takes, each with its name, its command, and the runs that it needs first."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastlt.recipe import Recipe, is_harmless, load_recipe
from fastlt.reproduce.cost import cost
from fastlt.reproduce.tables import Cell
from fastlt.run.atomic_file import atomic_file, read_json
from fastlt.run.dataset import converted_folder, ensure_converted
from fastlt.run.folder import class_history_file, last_checkpoint, log_file, result_file
from fastlt.run.lock import lock_folder, unlock_folder
from fastlt.run.recorded import is_complete, readable_result, written_inputs
from loaders.sources import SOURCES
from loaders.stored.atomic_folder import MANIFEST
from loaders.stored.dataset import ConvertedDataset
from loaders.stored.identity import DatasetIdentity
from loaders.stored.remote_folder import is_url

TRAIN = Path(__file__).resolve().parents[1] / "train.py"

# Keys that are left out of the digest that names a run, besides the harmless ones.
NOT_IN_NAME = ("seed", "data.converted")


@dataclass(frozen=True)
class TrainingRun:
    """One run of the trainer: a recipe file, and the override words that go after it, all but its name.

    identity: equal for runs whose results are; they share a folder, whatever rows and tables ask for them. first: the
    run of all stages but the last, whose end this one goes on from; None for a recipe of one stage.
    """

    path: Path
    words: tuple[str, ...]
    recipe: Recipe
    identity: str
    first: TrainingRun | None

    @property
    def name(self) -> str:
        """Of the folder with its identity, by whatever recipe file that was made; else of a new one by this file."""
        # Looked up each time: another row of the same campaign may have made it since the runs were planned.
        there = sorted(Path(self.recipe.runs).glob(f"*-{self.identity}"))
        return there[0].name if there else f"{self.path.stem}-{self.identity}"

    @property
    def folder(self) -> Path:
        return self.recipe.folder.with_name(self.name)

    def command(self, threads: int | None) -> list[str]:
        """What trains it; threads: where it has to share the machine and the recipe does not say otherwise."""
        given = {"num_threads": self.recipe.num_threads, "data.num_workers": self.recipe.data.num_workers}
        words = [f"{key}={threads}" for key, value in given.items() if value is None and threads is not None]
        return [sys.executable, str(TRAIN), str(self.path), *self.words, *words, f"name={self.name}"]

    @property
    def cost(self) -> float:
        """About its time beside that of other runs, without the runs that it needs."""
        stages = list(self.recipe.stages.values())
        return cost(self.recipe, stages if self.first is None else stages[-1:])

    @property
    def needs(self) -> tuple[TrainingRun, ...]:
        """The runs that have to be finished before this one starts."""
        if self.first is None or last_checkpoint(self.folder).exists():
            return ()
        return (self.first,)

    def prepare(self) -> None:
        """Convert its data, if a run may do that, and make its folder stand where the first run ended.

        The trainer resumes there, bit for bit. ValueError when another process trains there, or the data are not there.
        """
        data = self.recipe.data
        if data.convert and SOURCES[data.source].small and not is_url(data.converted):
            # Here, once: of several runs that begin at a time, each would want to convert.
            ensure_converted(data, converted_folder(data))
        if self.first is None or not self.needs:
            return
        last = last_checkpoint(self.first.folder)
        history = class_history_file(self.first.folder)
        beside = [log_file(self.first.folder), *([history] if history.exists() else [])]
        # The last checkpoint comes last: with it the folder is ready, see `needs`.
        files = [*beside, *(p for p in last.parent.iterdir() if p != last), last]
        lock_folder(self.folder)
        try:
            for file in files:
                with file.open("rb") as old, atomic_file(self.folder / file.relative_to(self.first.folder)) as new:
                    shutil.copyfileobj(old, new)
        finally:
            unlock_folder(self.folder)

    def finished(self) -> bool:
        """Whether the folder holds the result of this recipe on these data.

        Of another recipe, or of other data, train.py refuses with the reason.
        """
        return is_complete(replace(self.recipe, name=self.name)) and self._has_its_data()

    def _has_its_data(self) -> bool:
        """Whether the data are those of the run in the folder; True where there are none to compare."""
        record, data = written_inputs(self.folder), self.recipe.data
        folder = None if is_url(data.converted) else converted_folder(data)
        if not data.convert or record is None or folder is None or not (folder / MANIFEST).exists():
            return True
        identity = _identity(folder, (folder / MANIFEST).stat().st_mtime_ns)
        return identity is None or not identity.differences(record.inputs.data)


@dataclass(frozen=True)
class EnsembleRun:
    """Finished runs put together by `fastlt ensemble`; it can be asked what a training run can."""

    members: tuple[TrainingRun, ...]
    identity: str
    name: str

    @property
    def folder(self) -> Path:
        return self.members[0].folder.with_name(self.name)

    def command(self, threads: int | None) -> list[str]:
        """What puts them together; threads: not used, it takes a moment."""
        folders = [str(member.folder) for member in self.members]
        return [sys.executable, "-m", "fastlt", "ensemble", *folders, "--out", str(self.folder)]

    @property
    def cost(self) -> float:
        return 0.0

    @property
    def needs(self) -> tuple[TrainingRun, ...]:
        return self.members

    def prepare(self) -> None:
        """Nothing: the members' folders are read where they are."""

    def finished(self) -> bool:
        """Whether the folder holds the ensemble of the members' results as they are now."""
        result = readable_result(self.folder)
        if result is None or not all(member.finished() for member in self.members):
            return False
        recorded = [(m["run"], m["top1"]) for m in result.get("members", [])]
        return recorded == [(m.name, read_json(result_file(m.folder))["top1"]) for m in self.members]


@lru_cache
def _identity(folder: Path, modified_ns: int) -> DatasetIdentity | None:
    """What a data set is by its manifest; modified_ns: of that file, which is read again when it has changed."""
    return ConvertedDataset.open(folder).recorded_identity()


Run = TrainingRun | EnsembleRun


def plan_run(cell: Cell, runs: Path, seed: int) -> Run:
    """The run of a cell under a seed, with those that it needs."""
    if not cell.members:
        return _plan_alone(cell, runs, seed)
    members = tuple(_plan_alone(member, runs, seed) for member in cell.members)
    identity = f"{digest([m.identity for m in members])}-{seed}"
    return EnsembleRun(members, identity, f"{cell.recipe}-{identity}")


def _plan_alone(cell: Cell, runs: Path, seed: int) -> TrainingRun:
    return _plan(cell.path, [*cell.overrides, f"runs={runs}", f"seed={seed}"])


def _plan(path: Path, words: list[str]) -> TrainingRun:
    recipe = load_recipe(path, words)
    *before, last = recipe.stages
    try:
        first = _plan(path, [*words, f"stages.{last}=null"]) if before else None
    except ValueError:
        first = None  # stages that are no recipe without the last one are trained with it
    return TrainingRun(path, tuple(words), recipe, identity_of(recipe), first)


def digest(value: Any, digits: int = 8) -> str:
    """So many digits that are equal for equal containers."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def identity_of(recipe: Recipe) -> str:
    """A text that is equal for recipes whose results are, on the same data."""
    return f"{result_digest(recipe)}-{recipe.seed}"


def result_digest(recipe: Recipe) -> str:
    """Eight digits that are equal for recipes whose results are, under the same seed and on the same data."""
    tree = not_default(recipe)
    for key in NOT_IN_NAME:
        section, _, last = key.rpartition(".")
        (tree[section] if section else tree).pop(last, None)
    return digest(tree)


def not_default(value: Any) -> Any:
    """A recipe's keys that can change a result and differ from their defaults.

    A key that a later version adds leaves older runs their name.
    """
    if isinstance(value, dict):
        return {key: not_default(v) for key, v in value.items()}
    if not is_dataclass(value):
        return value
    told = {}
    for key in fields(value):
        if is_harmless(key):
            continue
        default = key.default if key.default_factory is MISSING else key.default_factory()
        own = getattr(value, key.name)
        if own == default:
            continue
        own = not_default(own)
        # The options of a method that are all left at their defaults are as good as not given.
        if own != {}:
            told[key.name] = own
    return told
