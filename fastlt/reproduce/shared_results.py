"""Results of finished runs in one file, by which machines share the runs of a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlt import strict_json
from fastlt.file_lock import locked
from fastlt.recipe import Recipe, RecipeError, recipe_from_tree, without_paths
from fastlt.reproduce.plan import identity_of
from fastlt.run.atomic_file import read_json, write_atomically

PATIENCE_S = 60.0  # that another call may take to write the file


@dataclass(frozen=True)
class SharedResult:
    """A run's recipe and its result.json."""

    recipe: Recipe
    result: dict[str, Any]


class SharedResults:
    """Results by what their runs have trained: by recipes with file names and checksums for paths."""

    def __init__(self, results: Iterable[SharedResult] = ()) -> None:
        self.by_key = {_key(one.recipe): one for one in results}

    def add(self, recipe: Recipe, result: dict[str, Any]) -> None:
        """Take the result of a recipe, in place of an earlier one."""
        self.by_key[_key(recipe)] = SharedResult(recipe, result)

    def update(self, others: SharedResults) -> None:
        """Take all results of `others`, in place of earlier ones."""
        self.by_key |= others.by_key

    def get(self, recipe: Recipe) -> dict[str, Any] | None:
        """The result of a recipe; None where there is none."""
        found = self.by_key.get(_key(recipe))
        return None if found is None else found.result

    def add_to(self, file: Path) -> None:
        """Write these results into a file, in which those of other calls stay, also of calls that write it just now.

        ValueError where another call is at it for a minute.
        """
        with locked(file.with_name(f"{file.name}.lock"), PATIENCE_S) as alone:
            if not alone:
                raise ValueError(f"{file} is written by another process, which does not end; stop it, and try again")
            results = read_results([file] if file.exists() else [])
            results.update(self)
            results.write(file)

    def write(self, file: Path) -> None:
        """A JSON list with a line a run; nothing in it says where files are on this machine."""
        lines = [
            strict_json.dumps({"recipe": without_paths(one.recipe).to_tree(), "result": one.result})
            for _, one in sorted(self.by_key.items())
        ]
        write_atomically(file, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def _key(recipe: Recipe) -> str:
    # By this version's defaults: a default that has changed makes no run pass for another.
    return identity_of(without_paths(recipe))


def read_results(files: Sequence[Path]) -> SharedResults:
    """The results of files that `SharedResults.write` wrote; of two of one run, the later.

    ValueError when a file is none, or has a recipe that this version of fastlt does not know.
    """
    found = []
    for file in files:
        content = read_json(file, "copy it again from where it was written")
        if not isinstance(content, list):
            raise ValueError(f"{file} has no results of runs; give a TABLE_runs.json of fastlt reproduce")
        for place, entry in enumerate(content):
            try:
                found.append(SharedResult(recipe_from_tree(entry["recipe"]), dict(entry["result"])))
            except (RecipeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}: entry {place} is no result of a run ({error})") from None
    return SharedResults(found)
