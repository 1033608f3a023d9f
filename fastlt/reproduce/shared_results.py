"""Results of finished runs in one file, by which machines share the runs of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastlt import strict_json
from fastlt.recipe import Recipe, RecipeError, differences, recipe_from_tree, without_paths
from fastlt.run.checkpoint import read_json, write_atomically


@dataclass(frozen=True)
class SharedResult:
    """A run's recipe and its result.json."""

    recipe: Recipe
    result: dict[str, Any]

    def is_of(self, recipe: Recipe) -> bool:
        """Whether a recipe would give this result, on the same data."""
        return not differences(without_paths(self.recipe), without_paths(recipe))


def read_results(files: Sequence[Path]) -> dict[str, SharedResult]:
    """The results of files that `write_results` wrote, by the identities of their runs; the first of two is taken.

    ValueError when a file is none, or has a recipe that this version of fastlt does not know.
    """
    found: dict[str, SharedResult] = {}
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError(f"{file} has no results; give a TABLE_runs.json of fastlt reproduce")
        for identity, entry in content.items():
            try:
                one = SharedResult(recipe_from_tree(entry["recipe"]), dict(entry["result"]))
                one.result["top1"], one.result["name"]
            except (RecipeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}: {identity} is no result of a run ({error})") from None
            found.setdefault(identity, one)
    return found


def write_results(file: Path, results: Mapping[str, SharedResult]) -> None:
    """A line a run, sorted; nothing in them says where files are on this machine."""
    lines = [
        f"{strict_json.dumps(identity)}: "
        + strict_json.dumps({"recipe": without_paths(one.recipe).to_tree(), "result": one.result})
        for identity, one in sorted(results.items())
    ]
    write_atomically(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
